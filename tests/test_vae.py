"""The VAE: which frames depend on which, its chunks, its published size."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import VAE_CONFIG, draw
from flax import nnx

from cogvideox_jax.conversion.tensors import abstract_params
from cogvideox_jax.models import vae
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.models.vae_config import VAEConfig
from cogvideox_jax.models.vae_layers import Carry, CausalConv


@pytest.fixture(scope="module")
def model():
  return nnx.merge(graph_of(VAE, VAE_CONFIG), draw(VAE, VAE_CONFIG)[1])


def frames_of(count, seed=0):
  return jax.random.normal(jax.random.key(seed), (1, count, 8, 8, 3))


def gradient_by_frame(function, x):
  """The summed gradient magnitude of the function at each frame of x."""
  return np.abs(jax.grad(function)(x)).sum((0, 2, 3, 4))


def test_the_published_vae_has_as_many_parameters_as_diffusers():
  sizes = [x.size for x in jax.tree.leaves(abstract_params(VAE, VAEConfig()))]
  assert sum(sizes) == 215_583_907


@pytest.fixture(scope="module")
def moved(model):
  """Whether latent [f] changes with frame [F] of 17: each frame is changed alone."""

  def latents(x):
    return np.asarray(vae.encode(model, x)[0][0])

  x = frames_of(17)
  before = latents(x)
  changes = [latents(x.at[:, frame].add(0.5)) != before for frame in range(17)]
  return np.stack(changes).any((2, 3, 4))


def test_frames_of_a_later_chunk_do_not_change_earlier_latents(moved):
  assert moved[:9, :3].any(1).all()
  assert not moved[9:, :3].any()


def test_a_later_chunk_sees_the_frames_before_it(moved):
  assert moved[9:, 3:].any(1).all()
  assert moved[7:9, 3:].any(1).all()  # Carried by the convolutions.


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


def test_streams_give_the_same_as_whole_videos_and_hold_one_chunk_at_a_time(model):
  frames, ends = frames_of(25), vae.PLANS["diffusers"].encode(25)
  held = []

  def chunks(x, ends):
    for start, end in itertools.pairwise([0, *ends]):
      held.append(end)
      yield x[:, start:end]

  stream = vae.encode_stream(model, chunks(frames, ends))
  first, _ = next(stream)
  assert held == ends[:1] and first.shape[1] == 3
  mean = jnp.concatenate([first, *(mean for mean, _ in stream)], axis=1)
  np.testing.assert_array_equal(mean, vae.encode(model, frames)[0])
  stream = vae.decode_stream(model, chunks(mean, vae.PLANS["diffusers"].decode(7)))
  np.testing.assert_array_equal(jnp.concatenate(list(stream), axis=1), vae.decode(model, mean))
