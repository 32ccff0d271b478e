"""Each token gets the modulation of its clip and expert, and gives its gradient to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogvideox_jax.models.modulation import ONE_CLIP, per_token


def drawn(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("rows", [1, ONE_CLIP, ONE_CLIP + 1, 66])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_token_gets_its_row_and_gives_its_gradient_to_it(rows, dtype):
  table, g = drawn(2, rows, 24).astype(dtype), drawn(2, 50, 24, seed=1).astype(dtype)
  index = jnp.asarray(np.random.default_rng(2).integers(0, rows, (2, 50)))
  found, pull_back = jax.vjp(lambda table: per_token(table, index), table)
  expected = np.take_along_axis(np.asarray(table), np.asarray(index)[..., None], axis=1)
  np.testing.assert_array_equal(found, expected)

  summed = np.zeros((2, rows, 24), np.float32)
  for row in range(2):
    np.add.at(summed[row], np.asarray(index[row]), np.asarray(g[row], np.float32))
  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
  (ours,) = pull_back(g)
  assert ours.dtype == dtype
  np.testing.assert_allclose(np.float32(ours), summed, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, ONE_CLIP, 8])
def test_padding_gets_something_finite_and_gives_no_gradient(rows):
  index = jnp.asarray([[-2, -1, 0]])
  found, pull_back = jax.vjp(lambda table: per_token(table, index), drawn(1, rows, 4))
  assert found.shape == (1, 3, 4) and jnp.isfinite(found).all()
  gradient = pull_back(jnp.ones((1, 3, 4)))[0]
  np.testing.assert_array_equal(gradient, jnp.zeros((1, rows, 4)).at[0, 0].set(1))
