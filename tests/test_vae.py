"""The VAE: what sees what, its forms of convolution, its chunks, its published size."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import VAE_CONFIG, draw
from flax import nnx

from cogvideox_jax.conversion.tensors import abstract_params
from cogvideox_jax.models import vae
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.vae import VAE, Carry, CausalConv, VAEConfig


@pytest.fixture(scope="module")
def model():
  return nnx.merge(graph_of(VAE, VAE_CONFIG), draw(VAE, VAE_CONFIG)[1])


def frames_of(count, seed=0):
  return jax.random.normal(jax.random.key(seed), (1, count, 8, 8, 3))


def gradient_by_frame(function, x):
  """How strongly each frame of x moves the function's value."""
  return np.abs(jax.grad(function)(x)).sum((0, 2, 3, 4))


def test_the_published_vae_has_as_many_parameters_as_diffusers():
  sizes = [x.size for x in jax.tree.leaves(abstract_params(VAE, VAEConfig()))]
  assert sum(sizes) == 215_583_907


def test_frames_of_a_later_chunk_do_not_change_earlier_latents(model):
  def first_chunk(x):
    return jnp.square(vae.encode(model, x)[0][:, :3]).sum()

  moved = gradient_by_frame(first_chunk, frames_of(17))
  assert (moved[:9] > 0).all()
  assert (moved[9:] == 0).all()


def test_a_later_chunk_sees_the_frames_before_it(model):
  def second_chunk(x):
    return jnp.square(vae.encode(model, x)[0][:, 3:]).sum()

  moved = gradient_by_frame(second_chunk, frames_of(17))
  assert (moved[9:] > 0).all()
  assert (moved[7:9] > 0).all()  # Carried by the convolutions.


def test_a_convolution_sees_no_later_frame_of_its_chunk():
  conv = CausalConv(3, 4, rngs=nnx.Rngs(0))

  def frame_3(x):
    return jnp.square(conv(x, Carry(None))[:, 3]).sum()

  moved = gradient_by_frame(frame_3, frames_of(6))
  assert (moved > 0).tolist() == [False, True, True, True, False, False]


def test_convolutions_in_chunks_equal_the_whole():
  conv = CausalConv(3, 4, rngs=nnx.Rngs(0))
  x = frames_of(7)
  whole = conv(x, Carry(None))
  carry = Carry(None)
  first = conv(x[:, :4], carry)
  second = conv(x[:, 4:], Carry(carry.kept))
  np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-5)


@pytest.mark.parametrize("form", [vae._convolve_by_taps, vae._convolve_by_pairs, vae.convolve])
@pytest.mark.parametrize("frames", [1, 4, 5])  # That come out; an odd number is no pairs.
def test_all_forms_of_the_convolution_agree_in_values_and_gradients(form, frames):
  x = jax.random.normal(jax.random.key(0), (2, frames + 2, 5, 4, 3))
  kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 3, 4))

  @partial(jax.jit, static_argnums=0)
  def run(form):
    def loss(x, kernel):
      return jnp.sin(form(x, kernel)).sum()

    return form(x, kernel), jax.grad(loss, (0, 1))(x, kernel)

  ours, expected = run(form), run(vae._convolve_3d)
  assert ours[0].shape == (2, frames, 5, 4, 4)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), ours, expected)


def test_pairs_of_frames_are_about_as_exact_as_the_taps():
  x = np.random.default_rng(0).standard_normal((1, 10, 8, 8, 32))
  kernel = np.random.default_rng(1).standard_normal((3, 3, 3, 32, 32))
  with jax.enable_x64(True):
    exact = np.asarray(vae._convolve_3d(jnp.asarray(x), jnp.asarray(kernel)))
  error = {
    form: np.linalg.norm(np.asarray(form(jnp.float32(x), jnp.float32(kernel))) - exact)
    for form in (vae._convolve_by_taps, vae._convolve_by_pairs)
  }
  assert error[vae._convolve_by_pairs] < 2 * error[vae._convolve_by_taps]


def test_the_form_of_the_convolution_follows_from_what_the_program_is_for():
  def convolved_frames(platform, frames=4, dtype=jnp.float32):
    x = jax.ShapeDtypeStruct((1, frames + 2, 8, 8, 8), dtype)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 8, 8), dtype)
    lowered = jax.jit(vae.convolve).trace(x, kernel).lower(lowering_platforms=(platform,))
    convolutions = re.findall(r"stablehlo.convolution.*-> tensor<(\d+)x(\d+)", lowered.as_text())
    return [int(size if size != "1" else frames) for size, frames in convolutions]

  assert convolved_frames("cuda") == [4]
  assert convolved_frames("tpu") == [4, 4, 4]
  assert convolved_frames("cpu") == [2, 2, 2, 2]
  assert len(convolved_frames("cpu", frames=1)) == 3
  assert convolved_frames("cpu", dtype=jnp.bfloat16) == [4, 4, 4]


@pytest.mark.parametrize(
  ("frames", "lengths"),
  [(1, [1]), (5, [5]), (8, [8]), (9, [9]), (13, [13]), (17, [9, 8]), (49, [9, 8, 8, 8, 8, 8])],
)
def test_the_remainder_goes_into_the_first_chunk(frames, lengths):
  assert np.diff([0, *vae.chunks_of(vae.ENCODE_CHUNK, frames)]).tolist() == lengths


@pytest.mark.parametrize(("latents", "frames"), [(1, 1), (2, 8), (3, 9), (5, 17)])
def test_odd_latents_decode_to_a_first_frame_alone_and_even_ones_do_not(model, latents, frames):
  z = jax.ShapeDtypeStruct((1, latents, 2, 2, 4), jnp.float32)
  assert jax.eval_shape(lambda z: vae.decode(model, z), z).shape == (1, frames, 8, 8, 3)


def test_one_program_for_the_first_chunk_and_one_for_all_later_ones(model):
  before = vae.encode_chunk._cache_size()
  for count in (9, 17, 25):
    vae.encode(model, frames_of(count))
  assert vae.encode_chunk._cache_size() - before <= 2
