"""Noised first frames: the published distribution, and the same for the same clip."""

import numpy as np

from cogvideox_jax.data.noising import ImageNoise, noised_copies
from configs import base

FRAME = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
PUBLISHED = base.get_config().image
NOISE = ImageNoise(400, PUBLISHED.log_sigma_mean, PUBLISHED.log_sigma_std, seed=5)


def test_the_deviation_is_log_normal_as_published_and_nothing_is_clipped():
  noise = noised_copies(FRAME, "a.mp4", NOISE) - (np.float32(FRAME) / 127.5 - 1)
  logs = np.log(noise.std(axis=(1, 2, 3)))
  assert abs(logs.mean() - -3.0) < 4 * 0.5 / np.sqrt(400)
  assert abs(logs.std() - 0.5) < 4 * 0.5 / np.sqrt(2 * 400)
  standard = noise / noise.std(axis=(1, 2, 3), keepdims=True)
  assert abs((np.abs(standard) < 1).mean() - 0.6827) < 0.005  # Normal, also at black and white.
  bright = FRAME == 255
  assert (noise[:, bright] > 0).mean() > 0.45


def test_copies_follow_from_the_source_and_the_seed():
  few = NOISE._replace(draws=2)
  copies = noised_copies(FRAME, "a.mp4", few)
  assert copies.dtype == np.float32
  assert not np.array_equal(copies[0], copies[1])
  np.testing.assert_array_equal(copies, noised_copies(FRAME, "a.mp4", few))
  for source, noise in (("b.mp4", few), ("a.mp4", few._replace(seed=6))):
    assert not np.array_equal(copies, noised_copies(FRAME, source, noise))
