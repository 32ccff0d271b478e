"""LPIPS beside PyTorch's lpips 0.1.4, and its gradient."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lpips_pictures import SIZES, pictures

from cogvideox_jax.errors import UserError
from cogvideox_jax.evaluation.lpips_weights import lpips_params
from cogvideox_jax.models import lpips as module
from cogvideox_jax.models.lpips import BACKBONES, abstract_params, lpips

GOLDENS = json.loads((Path(__file__).parent / "data" / "lpips_goldens.json").read_text())
LARGE = pytest.mark.slow
COLOURS = np.float32([[r, g, b] for r in (-1, 1) for g in (-1, 1) for b in (-1, 1)])


@pytest.fixture(scope="module", params=BACKBONES)
def network(request) -> str:
  return request.param


@pytest.fixture(scope="module")
def params(network):
  return lpips_params(network)


def plain(side: int) -> jax.Array:
  """Eight pictures of one colour each: the corners of the cube of colours."""
  return jnp.broadcast_to(COLOURS[:, None, None], (8, side, side, 3))


@pytest.mark.parametrize(
  "size", [SIZES[0], *(pytest.param(size, marks=LARGE) for size in SIZES[1:])], ids=str
)
def test_it_equals_pytorchs(network, params, size):
  ours = jax.jit(partial(lpips, network=network))(params, *pictures(*size))
  golden = GOLDENS[f"{network} {size[0]}x{size[1]}"]
  np.testing.assert_allclose(ours, golden, atol=1e-6, rtol=0)


@partial(jax.jit, static_argnames="network")
def gradient(params, x, y, network):
  """The sum of distances, and its gradient with respect to x."""
  return jax.value_and_grad(lambda x: lpips(params, x, y, network=network).sum())(x)


@pytest.mark.parametrize("side", [16, 32, pytest.param(64, marks=LARGE)])
def test_its_gradient_is_finite_between_plain_pictures(network, params, side):
  side = max(side, BACKBONES[network].smallest)
  value, found = gradient(params, plain(side), jnp.roll(plain(side), 1, axis=0), network)
  assert value > 0 and np.isfinite(found).all()


def test_its_gradient_is_finite_where_all_features_are_zero(network, params):
  low = jax.tree.map(np.copy, params)
  for layer in low["features"].values():
    layer["conv"]["bias"] -= 1e4  # No convolution reaches zero.
  x, y = (jnp.asarray(z[:1, :32, :32]) for z in pictures(64, 64))
  value, found = gradient(low, x, y, network)
  assert value == 0 and np.isfinite(found).all()


def test_scaling_a_vector_of_zeros_has_a_finite_gradient():
  x = jnp.zeros((1, 1, 2, 3)).at[0, 0, 1].set(1.0)
  found = jax.grad(lambda x: (module._unit(x) * jnp.arange(3.0)).sum())(x)
  assert np.isfinite(found).all()
  np.testing.assert_allclose(module._unit(x)[0, 0], [[0, 0, 0], [3**-0.5] * 3], atol=1e-7)


def test_a_clip_has_a_distance_for_each_frame(network, params):
  x, y = (jnp.stack([z[:2], z[1:]])[:, :, :32, :32] for z in pictures(64, 64))
  distance = jax.jit(partial(lpips, network=network))
  found = distance(params, x, y)
  assert found.shape == (2, 2)
  np.testing.assert_allclose(found[0, 1], found[1, 0], atol=1e-6)
  np.testing.assert_array_equal(distance(params, x, x), 0)


def test_bfloat16_is_near(network, params):
  x, y = (jnp.asarray(z[:1, :32, :32]) for z in pictures(64, 64))
  distance = jax.jit(partial(lpips, network=network))
  rounded = distance(params, jnp.bfloat16(x), jnp.bfloat16(y))
  assert rounded.dtype == jnp.float32
  np.testing.assert_allclose(rounded, distance(params, x, y), rtol=0.05)


def test_pictures_too_small_for_the_network_are_refused(network, params):
  side = BACKBONES[network].smallest
  assert np.isfinite(lpips(params, *(plain(side)[:2, None],) * 2, network=network)).all()
  with pytest.raises(UserError, match=f"at least {side} pixels"):
    lpips(params, *(plain(side - 1)[:2],) * 2, network=network)


def test_the_shapes_of_the_parameters_are_known_without_the_package(network, params):
  found = jax.tree.map(lambda x: (x.shape, x.dtype), params)
  assert found == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(network))
