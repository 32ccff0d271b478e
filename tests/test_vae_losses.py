"""The terms of the VAE's loss: their values, what they look at, and what they move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import VAE_CONFIG, draw
from flax import nnx

from cogvideox_jax import sharding
from cogvideox_jax.models import vae
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.sharded_vae import share_clips
from cogvideox_jax.training import vae_losses
from cogvideox_jax.training.vae_losses import LossWeights, Perceptual
from cogvideox_jax.training.vae_step import Reconstruction, vae_loss

ALONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
KEYS = jax.random.split(jax.random.key(1), 2)
CLIPS = jnp.float32(np.random.default_rng(0).uniform(-1, 1, (2, 5, 8, 8, 3)))
NOISY = CLIPS + 0.1 * jnp.float32(np.random.default_rng(1).normal(size=CLIPS.shape))


def mean_square(params, x, y):
  """A perceptual distance that needs no network, scaled by its one parameter."""
  return params["scale"] * jnp.square(x - y).mean(axis=(2, 3, 4))


def test_the_loss_is_the_weighted_sum_of_its_terms():
  model = nnx.merge(graph_of(VAE, VAE_CONFIG), draw(VAE, VAE_CONFIG)[1])
  frames = CLIPS[:, :1]
  mean, logvar = vae.encode(model, frames)
  made = Reconstruction(NOISY[:, :1], mean, logvar)
  mesh = sharding.make_mesh(ALONE, jax.devices()[:1])
  clips = share_clips(mesh, sharding.rules_named("fsdp"), VAE_CONFIG.temporal_compression, 1)
  weights = LossWeights(l1=0.5, l2=2.0, kl=0.1, perceptual=3.0)
  perceptual, network = Perceptual(mean_square, 0), {"scale": jnp.float32(2)}
  loss, parts = vae_loss(clips, made, frames, KEYS, weights, perceptual, network)
  difference = np.asarray(NOISY - CLIPS)[:, :1]
  expected = {
    "l1": np.abs(difference).mean(),
    "mse": np.square(difference).mean(),
    "lpips": 2 * np.square(difference).mean(),
    "kl": 0.5 * np.mean(mean**2 + np.exp(logvar) - 1 - logvar),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(parts[name], value, rtol=1e-5)
  total = sum(
    weight * expected[name]
    for name, weight in (("l1", 0.5), ("mse", 2.0), ("lpips", 3.0), ("kl", 0.1))
  )
  np.testing.assert_allclose(loss, total, rtol=1e-5)
  # The range of [-1, 1] is 2.
  np.testing.assert_allclose(
    vae_losses.psnr(parts["mse"]), 20 * np.log10(2 / np.sqrt(expected["mse"])), rtol=1e-5
  )


MANY = jax.random.split(jax.random.key(3), 200)
NUMBERED = jnp.broadcast_to(jnp.arange(5.0)[None, :, None, None, None], (200, 5, 1, 1, 3))


def test_each_clip_has_frames_of_its_own_drawn_once_each():
  drawn = np.asarray(vae_losses.drawn_frames(NUMBERED, MANY, 2)[:, :, 0, 0, 0])
  assert all(first != second for first, second in drawn)
  assert len({tuple(sorted(pair)) for pair in drawn.tolist()}) == 10  # All pairs of five.
  for count in (0, 5, 9):
    np.testing.assert_array_equal(vae_losses.drawn_frames(NUMBERED, MANY, count), NUMBERED)


def test_a_window_is_successive_frames_and_every_start_comes():
  drawn = np.asarray(vae_losses.drawn_window(NUMBERED, MANY, 3)[:, :, 0, 0, 0])
  np.testing.assert_array_equal(np.diff(drawn), 1)
  assert set(drawn[:, 0]) == {0, 1, 2}
  np.testing.assert_array_equal(vae_losses.drawn_window(NUMBERED, MANY, 0), NUMBERED)


def linear_judge(slope):
  return lambda clips: slope * clips.mean(axis=(-1,))[:, :, ::4, ::4] + 0.25


def test_the_hinge_losses_are_those_of_their_definition():
  judge = linear_judge(3.0)
  real, fake = (np.asarray(judge(x)) for x in (CLIPS, NOISY))
  loss, metrics = vae_losses.discriminator_loss(judge, CLIPS, NOISY, 0.0)
  hinge = (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean()) / 2
  np.testing.assert_allclose(loss, hinge, rtol=1e-5)
  np.testing.assert_allclose(metrics["logits_real"], real.mean(), rtol=1e-5)
  np.testing.assert_allclose(vae_losses.generator_loss(judge, NOISY), -fake.mean(), rtol=1e-5)


def test_the_gradient_penalty_is_half_the_squared_gradient_of_the_mean_logit():
  judge = linear_judge(3.0)
  plain, _ = vae_losses.discriminator_loss(judge, CLIPS, NOISY, 0.0)
  loss, metrics = vae_losses.discriminator_loss(judge, CLIPS, NOISY, 8.0)
  # Of 5 x 2 x 2 logits each is the slope times the mean of the three colours of one pixel.
  expected = 20 * 3 * (3.0 / 3 / 20) ** 2
  np.testing.assert_allclose(metrics["r1"], expected, rtol=1e-5)
  np.testing.assert_allclose(loss - plain, 4 * expected, rtol=1e-3)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_noise_of_a_clip_follows_from_its_own_key(rows):
  keys = jax.random.split(jax.random.key(2), 3)
  whole = vae_losses.posterior_noise(keys, (2, 4, 4, 4))
  np.testing.assert_array_equal(vae_losses.posterior_noise(keys[:rows], (2, 4, 4, 4)), whole[:rows])
  assert abs(float(whole.std()) - 1) < 0.15
