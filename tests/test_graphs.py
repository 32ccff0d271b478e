"""Models without their parameters: the structure and shapes of those that are built."""

import jax
import pytest
from drawn import DIT_CONFIG, T5_CONFIG, VAE_CONFIG
from flax import nnx

from cogvideox_jax.conversion.tensors import abstract_params
from cogvideox_jax.models import graphs
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.t5 import T5Encoder
from cogvideox_jax.models.vae import VAE

MODELS = [(DiT, DIT_CONFIG), (VAE, VAE_CONFIG), (T5Encoder, T5_CONFIG)]


@pytest.mark.parametrize(("model", "config"), MODELS)
def test_structure_and_shapes_are_those_of_a_model_that_is_built(model, config):
  built = nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0)))
  graph, params = nnx.split(built, nnx.Param)
  assert graphs.graph_of(model, config) == graph
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(model, config))
  assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), nnx.to_pure_dict(params))


@pytest.mark.parametrize(("model", "config"), MODELS)
def test_a_model_is_traced_once_for_each_of_its_options(model, config, monkeypatch):
  graphs.abstract.cache_clear()
  graph = graphs.graph_of(model, config)
  monkeypatch.setattr(nnx, "eval_shape", lambda make: pytest.fail("traced again"))
  assert graphs.graph_of(model, config) is graph
