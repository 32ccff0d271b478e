"""The table of rematerialization: each policy repeats as much of the forward pass as it says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from drawn import DIT_CONFIG
from flax import nnx

from cogvideox_jax.aot import work
from cogvideox_jax.models import graphs
from cogvideox_jax.models.attention import attention
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.rematerialization import REMAT
from cogvideox_jax.types import TokenLayout

TOKENS = 64  # One block of attention, so that no loop has more than one trip.
# One wide layer, one clip and no rotation: all but linear layers and attention is under 1%.
MODEL = dataclasses.replace(
  DIT_CONFIG, depth=1, heads=8, head_dim=16, time_width=4, positions="sincos"
)


@functools.cache
def flops(remat):
  """FLOPs of the gradient of the model's parameters."""
  graph, params = graphs.abstract(DiT, MODEL, remat=remat)
  patch = MODEL.in_channels * 4
  layout = TokenLayout(
    segment_ids=jnp.ones((1, TOKENS), jnp.int32),
    experts=jnp.zeros((1, TOKENS), jnp.int32),
    coordinates=jnp.zeros((1, TOKENS, 3), jnp.int32),
    grids=jnp.ones((1, 2, 3), jnp.int32),
  )
  vision = jnp.ones((1, TOKENS, patch))
  text = jnp.ones((1, 1, MODEL.text_length, MODEL.text_width))
  time = jnp.ones((1, 2, MODEL.width))

  def loss(params):
    return nnx.merge(graph, params)(vision, text, time, layout, attention=attention).sum()

  return work.traced_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_a_policy_computes_again_as_much_as_its_row_says(remat):
  linear = work.linear_flops(MODEL, TOKENS)
  attended = work.attention_flops(MODEL, [TOKENS], work.FORWARD_PRODUCTS)
  expected = REMAT[remat].linear * linear + REMAT[remat].attention * attended
  assert flops(remat) - flops("none") == pytest.approx(expected, abs=0.01 * linear)
