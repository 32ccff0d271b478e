"""The frozen networks multiply in full float32 where they compute in float32, and only there."""

import jax
import jax.numpy as jnp
import pytest
from drawn import T5_CONFIG, VAE_CONFIG
from flax import nnx

from cogvideox_jax.models import vae
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.t5 import T5Encoder
from cogvideox_jax.models.vae import VAE

EXACT = jax.lax.Precision.HIGHEST


def products(jaxpr):
  """The precision of every product of matrices and convolution, inner programs included."""
  for equation in jaxpr.eqns:
    if equation.primitive.name in ("dot_general", "conv_general_dilated"):
      yield equation.params["precision"]
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from products(inner)


def traced(function, *args):
  return list(products(jax.make_jaxpr(function)(*args).jaxpr))


def check(found, dtype):
  assert len(found) > 4
  for precision in found:
    assert precision in (EXACT, (EXACT, EXACT)) if dtype == "float32" else precision is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_vae(dtype):
  graph = graph_of(VAE, VAE_CONFIG)
  params = nnx.state(nnx.eval_shape(lambda: VAE(VAE_CONFIG, rngs=nnx.Rngs(0))), nnx.Param)
  params = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), nnx.to_pure_dict(params))
  video, latents = jnp.zeros((1, 5, 32, 32, 3), dtype), jnp.zeros((1, 2, 4, 4, 4), dtype)
  check(traced(lambda p, x: vae.encode(nnx.merge(graph, p), x), params, video), dtype)
  check(traced(lambda p, z: vae.decode(nnx.merge(graph, p), z), params, latents), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_text_encoder(dtype):
  encoder = T5Encoder(T5_CONFIG, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
  graph, params = nnx.split(encoder)
  found = traced(lambda p, ids: nnx.merge(graph, p)(ids), params, jnp.zeros((1, 3), jnp.int32))
  check(found, dtype)
