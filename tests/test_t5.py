"""The T5 encoder alone; its agreement with transformers is in test_conversion and test_goldens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.t5.modeling_t5 import T5Attention

from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.t5 import T5Config, T5Encoder, relative_buckets

CONFIG = T5Config(vocab=50, width=24, head_dim=4, heads=3, mlp_width=40, depth=3)
IDS = jnp.array([[7, 3, 9, 1, 0, 0, 0, 0]])


@pytest.fixture(scope="module")
def encoder():
  rng = np.random.default_rng(0)
  graphdef, shapes = nnx.split(nnx.eval_shape(lambda: T5Encoder(CONFIG, rngs=nnx.Rngs(0))))
  params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), shapes)
  return nnx.merge(graphdef, params)


def test_padding_is_attended_to_and_has_states_of_its_own(encoder):
  longer = jnp.pad(IDS, ((0, 0), (0, 4)))
  states, more = encoder(IDS), encoder(longer)
  assert np.abs(more[:, :4] - states[:, :4]).max() > 1e-3
  assert np.abs(states[:, 5] - states[:, 6]).max() > 1e-3


def test_prompts_of_a_batch_do_not_see_each_other(encoder):
  both = encoder(jnp.concatenate([IDS, IDS[:, ::-1]]))
  np.testing.assert_allclose(both[:1], encoder(IDS), atol=1e-5)


def test_buckets_are_those_of_transformers():
  positions = torch.arange(300)
  for buckets, distance in [(32, 128), (16, 60)]:
    reference = T5Attention._relative_position_bucket(
      positions[None, :] - positions[:, None], True, buckets, distance
    )
    np.testing.assert_array_equal(relative_buckets(300, buckets, distance), reference)


def test_new_weights_have_the_sizes_of_t5():
  config = T5Config(vocab=400, width=96, head_dim=16, heads=8, mlp_width=160, depth=2)
  model = T5Encoder(config, rngs=nnx.Rngs(1))
  attention = model.blocks.attention
  stds = {
    1.0: model.embedding.embedding,
    (96 * 16) ** -0.5: attention.query.kernel,
    96**-0.5: attention.key.kernel,
    128**-0.5: attention.out.kernel,
    160**-0.5: model.blocks.mlp.down.kernel,
  }
  for std, weight in stds.items():
    np.testing.assert_allclose(np.std(weight[...]), std, rtol=0.05)
  layers = attention.query.kernel[...]
  assert np.abs(layers[0] - layers[1]).max() > 1e-3


def test_bfloat16_stays_close_to_float32(encoder):
  half = nnx.merge(graph_of(T5Encoder, CONFIG, dtype=jnp.bfloat16), nnx.state(encoder))
  states, exact = half(IDS), encoder(IDS)
  assert states.dtype == jnp.bfloat16
  error = jnp.linalg.norm(states.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
  assert error < 3e-2


def test_the_published_encoder_has_4_762_310_656_parameters():
  model = nnx.eval_shape(lambda: T5Encoder(T5Config(), rngs=nnx.Rngs(0)))
  sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
  assert sum(sizes) == 4_762_310_656
