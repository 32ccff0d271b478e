"""A variant of attention, experts or positions is chosen in one place of the transformer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import DIT_CONFIG, draw
from flax import nnx

from cogvideox_jax.models import layers, positions
from cogvideox_jax.models.attention import attention
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.types import TEXT, VISION, TokenLayout

PARAMS = jax.tree.map(jnp.asarray, draw(DiT, DIT_CONFIG)[1])
GRID = 2, 2, 3
TEXT_TOKENS, PATCHES = DIT_CONFIG.text_length, 2 * 2 * 3
TOKENS = TEXT_TOKENS + PATCHES


def layout_of():
  """One clip of GRID, its text in front."""
  text = np.zeros((TEXT_TOKENS, 3), np.int32)
  text[:, 0] = np.arange(TEXT_TOKENS)
  coordinates = np.concatenate([text, np.indices(GRID).reshape(3, -1).T]).astype(np.int32)
  experts = np.where(np.arange(TOKENS) < TEXT_TOKENS, TEXT, VISION).astype(np.int32)
  return TokenLayout(
    segment_ids=jnp.ones((1, TOKENS), jnp.int32),
    experts=jnp.asarray(experts)[None],
    coordinates=jnp.asarray(coordinates)[None],
    grids=jnp.asarray([[(1, 1, 1), GRID]], jnp.int32),
  )


def run(layout, config=DIT_CONFIG):
  """The model's v at vision tokens; the model is built anew, with the variants of the moment."""
  vision, text, time = (
    jax.random.normal(jax.random.key(seed), shape)
    for seed, shape in enumerate(
      [(1, TOKENS, 16), (1, 1, TEXT_TOKENS, DIT_CONFIG.text_width), (1, 2, DIT_CONFIG.width)]
    )
  )
  graph = nnx.graphdef(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))))

  @jax.jit
  def evaluate(params, layout):
    model = nnx.merge(graph, params)
    return model(vision, text, time, layout, attention=attention)[:, TEXT_TOKENS:]

  return evaluate(PARAMS, layout)


def test_a_rule_of_positions_is_one_row(monkeypatch):
  def mirrored(coordinates, grid, base, interpolations):
    return jnp.float32(grid - 1 - coordinates)

  monkeypatch.setitem(positions.ROTARY_RULES, "mirrored", mirrored)
  layout = layout_of()
  backwards = jnp.where(
    layout.experts[..., None] == VISION, jnp.array(GRID) - 1 - layout.coordinates, 0
  )
  ours = run(layout, dataclasses.replace(DIT_CONFIG, positions="mirrored"))
  text = layout.experts[..., None] == TEXT
  expected = run(layout._replace(coordinates=jnp.where(text, layout.coordinates, backwards)))
  np.testing.assert_allclose(ours, expected, atol=1e-6)
  assert np.abs(ours - run(layout)).max() > 1e-3


class VisionOnly(layers.SelfAttention):
  """Attention that leaves text alone."""

  def __call__(self, x, layout, rotary, attention):
    is_vision = (layout.experts == VISION)[..., None]
    return jnp.where(is_vision, super().__call__(x, layout, rotary, attention), 0.0)


class OneExpert(layers.ExpertAdaLayerNorm):
  """Text has the modulation of vision."""

  def __call__(self, x, time, layout):
    return super().__call__(x, time, layout._replace(experts=jnp.zeros_like(layout.experts)))


@pytest.mark.parametrize(
  ("name", "variant"), [("SelfAttention", VisionOnly), ("ExpertAdaLayerNorm", OneExpert)]
)
def test_a_variant_of_a_layer_is_a_module_that_the_block_names(monkeypatch, name, variant):
  before = run(layout_of())
  monkeypatch.setattr(layers, name, variant)
  after = run(layout_of())
  assert np.isfinite(after).all() and np.abs(after - before).max() > 1e-3
