"""The layer norm with a hand-written gradient, against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from cogvideox_jax.models.layer_norm import LayerNorm
from cogvideox_jax.models.rematerialization import STATISTICS

EPSILON = 1e-5


def drawn(*shape, seed=0, offset=0.0):
  return np.random.default_rng(seed).normal(offset, 1, shape).astype(np.float32)


def both_ways(x, scale, bias, g, dtype):
  norm = LayerNorm(x.shape[-1], EPSILON, dtype=dtype, rngs=nnx.Rngs(0))

  def run(x, scale, bias):
    return nnx.merge(nnx.graphdef(norm), {"scale": scale, "bias": bias})(x)

  y, pull_back = jax.vjp(run, x.astype(dtype), scale, bias)
  return y, *pull_back(g.astype(dtype))


@pytest.mark.parametrize("shape", [(2, 5, 48), (2, 5, 3, 16)])
@pytest.mark.parametrize("offset", [0.0, 100.0])  # Far from 0 a mean of squares has no digits left.
def test_values_and_gradients_are_those_of_torch(shape, offset):
  x, g = drawn(*shape, offset=offset), drawn(*shape, seed=1)
  scale, bias = drawn(shape[-1], seed=2), drawn(shape[-1], seed=3)
  ours = both_ways(
    jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias), jnp.asarray(g), jnp.float32
  )
  given = [torch.from_numpy(array).requires_grad_() for array in (x, scale, bias)]
  y = torch.nn.functional.layer_norm(given[0], shape[-1:], *given[1:], eps=EPSILON)
  y.backward(torch.from_numpy(g))
  for value, expected in zip(ours, (y, *(each.grad for each in given)), strict=True):
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-4, atol=1e-4)


def test_in_bfloat16_sums_are_in_float32():
  x, g = drawn(2, 500, 32), drawn(2, 500, 32, seed=1)
  scale, bias = jnp.ones(32), jnp.zeros(32)
  exact = both_ways(jnp.asarray(x), scale, bias, jnp.asarray(g), jnp.float32)
  half = both_ways(jnp.asarray(x), scale, bias, jnp.asarray(g), jnp.bfloat16)
  assert half[0].dtype == half[1].dtype == jnp.bfloat16
  for ours, expected in zip(half, exact, strict=True):
    error = jnp.linalg.norm(jnp.float32(ours) - expected) / jnp.linalg.norm(expected)
    assert error < 1e-2  # bfloat16 has 8 bits; sums of 1,000 numbers in it would be 10% off.


@pytest.mark.parametrize("offset", [0.0, 8.0, 100.0])
def test_far_from_0_bfloat16_is_normed_as_well_as_its_digits_allow(offset):
  x = jnp.asarray(drawn(200, 3072, offset=offset)).astype(jnp.bfloat16)
  norm = LayerNorm(3072, EPSILON, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  wide = torch.from_numpy(np.asarray(x, np.float32))
  expected = torch.nn.functional.layer_norm(wide, (3072,), eps=EPSILON).numpy()
  np.testing.assert_allclose(np.float32(norm(x)), expected, rtol=1e-2, atol=1e-2)


def test_equal_numbers_are_normed_to_zero_in_bfloat16():
  x = jnp.full((3, 3072), 777, jnp.bfloat16)
  norm = LayerNorm(3072, EPSILON, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  assert jnp.abs(norm(x)).max() < 1e-2


def test_its_statistics_can_be_saved_by_name():
  x = jnp.asarray(drawn(2, 5, 16))
  norm = LayerNorm(16, EPSILON, dtype=jnp.float32, rngs=nnx.Rngs(0))
  policy = jax.checkpoint_policies.save_only_these_names(STATISTICS)

  def roots(run):
    gradient = jax.grad(lambda x: jnp.sin(run(x)).sum())
    return str(jax.make_jaxpr(gradient)(x)).count("rsqrt")

  assert roots(jax.checkpoint(norm, policy=policy)) == roots(norm) == 1
  assert roots(jax.checkpoint(norm)) == 2
