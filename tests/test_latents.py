"""What a step draws: posteriors, repeated first frames, and images, which may be dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import v_loss
from einops import rearrange

from cogvideox_jax.data.packing import pack, stack
from cogvideox_jax.diffusion.latents import LatentConfig, draw_latents
from cogvideox_jax.diffusion.noise import NoiseConfig, add_noise, noise_schedule
from cogvideox_jax.types import TEXT, VISION, Example

CHANNELS, TEXT_LENGTH = 3, 2
NOISE = noise_schedule(NoiseConfig(1000, 0.00085, 0.012, 1.0, zero_terminal_snr=True))
CONFIG = LatentConfig((1, 2, 2), scaling_factor=0.7, image_scale=2.0, image_drop_rate=0.0)


def draw_example(seed, frames):
  rng = np.random.default_rng(seed)
  mean, logvar = rng.normal(size=(2, frames, 4, 6, CHANNELS)).astype(np.float32)
  image = rng.normal(size=(1, 2, 4, 6, CHANNELS)).astype(np.float32)
  text = np.zeros((TEXT_LENGTH, 4), np.float32)
  return Example(mean, logvar, text, "", "", 4 * frames - 3, 32, 48, 8.0, image=image)


def draw_batch(patch, frames=(3, 1, 2), rows=1):
  examples = [draw_example(seed, count) for seed, count in enumerate(frames)]
  row = pack(examples, patch=patch, row_tokens=60, max_clips=4)
  return stack([row] * rows)


def vision(batch, array, row, segment, patch):
  """Latents [f h w c] of one clip in tokens [b n p]."""
  tokens = array[row][(batch.segment_ids[row] == segment) & (batch.experts[row] == VISION)]
  f, h, w = batch.grids[row, segment]
  t, y, x = patch
  shape = {"f": f, "h": h, "w": w, "t": t, "y": y, "x": x}
  return rearrange(np.asarray(tokens), "(f h w) (c t y x) -> (f t) (h y) (w x) c", **shape)


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2)])
def test_an_image_stands_in_the_first_latent_frame_and_nowhere_else(patch):
  batch = draw_batch(patch)
  sure = batch._replace(image=np.stack([batch.image[:, :, 0], batch.image[:, :, 1] * 0 - 30], 2))
  drawn = draw_latents(sure, jax.random.key(0), CONFIG._replace(patch=patch))
  for segment, frames in enumerate((3, 1, 2), start=1):
    image = vision(batch, drawn.image, 0, segment, patch)
    expected = 2.0 * draw_example(segment - 1, frames).image[0, 0]
    np.testing.assert_allclose(image[0], expected, atol=1e-5)
    assert not image[1:].any()
  elsewhere = (batch.experts == TEXT) | (batch.segment_ids == 0)
  assert not np.asarray(drawn.image)[elsewhere].any()


def test_an_image_is_drawn_from_its_scaled_posterior():
  batch = draw_batch((1, 2, 2), frames=(1,))
  draw = jax.jit(jax.vmap(lambda key: draw_latents(batch, key, CONFIG).image))
  images = draw(jax.random.split(jax.random.key(0), 2000))[:, 0, TEXT_LENGTH:8]
  mean, logvar = batch.image[0, TEXT_LENGTH:8, 0], batch.image[0, TEXT_LENGTH:8, 1]
  spread = 2 * np.exp(logvar / 2)
  assert (np.abs(images.mean(0) - 2 * mean) < 5 * spread / np.sqrt(2000)).all()
  np.testing.assert_allclose(images.std(0), spread, rtol=0.1)


def test_images_are_dropped_at_the_rate_each_clip_by_itself_and_as_the_key_says():
  batch = draw_batch((1, 2, 2), rows=700)
  config = CONFIG._replace(image_drop_rate=0.05)
  first, again, other = (draw_latents(batch, jax.random.key(k), config).image for k in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  dropped = np.array(
    [
      [not vision(batch, image, row, segment, (1, 2, 2)).any() for segment in (1, 2, 3)]
      for image in (np.asarray(first), np.asarray(other))
      for row in range(700)
    ]
  )
  sigma = np.sqrt(0.05 * 0.95 / dropped.size)
  assert abs(dropped.mean() - 0.05) < 4 * sigma
  assert (dropped[:700] != dropped[700:]).any()
  assert abs((dropped[:, 0] & dropped[:, 1]).mean() - 0.05**2) < 0.005  # Not by the row.
  kept = vision(batch, np.asarray(first), int(np.argmin(dropped[:700, 0])), 1, (1, 2, 2))
  assert kept[0].all()  # A clip keeps all of its image, or none.


def test_images_leave_all_other_draws_as_they_are():
  batch = draw_batch((1, 2, 2))
  with_image = draw_latents(batch, jax.random.key(3), CONFIG)
  without = draw_latents(batch._replace(image=None), jax.random.key(3), CONFIG)
  assert without.image is None
  np.testing.assert_array_equal(with_image.x0, without.x0)
  np.testing.assert_array_equal(with_image.noise, without.noise)


@pytest.mark.parametrize("span", [2, 3])
def test_a_repeated_first_frame_is_drawn_once_and_noised_by_itself(span):
  patch = (span, 2, 2)
  batch = draw_batch(patch, frames=(3, 1, 4))
  drawn = draw_latents(batch, jax.random.key(0), CONFIG._replace(patch=patch))
  plain = draw_latents(batch._replace(extra=None), jax.random.key(0), CONFIG._replace(patch=patch))
  for segment, frames in enumerate((3, 1, 4), start=1):
    extra = -frames % span
    assert batch.extra[0, segment] == extra
    x0, noise, alone = (
      vision(batch, x, 0, segment, patch) for x in (drawn.x0, drawn.noise, plain.x0)
    )
    assert len(x0) == frames + extra
    np.testing.assert_array_equal(x0[extra:], alone[extra:])
    for copy in range(extra):
      np.testing.assert_array_equal(x0[copy], x0[extra])
      assert not np.array_equal(noise[copy], noise[extra])
      assert not np.array_equal(alone[copy], alone[extra])


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2)])
def test_the_network_is_shown_the_image_in_channels_behind_the_noised_latents(patch):
  """As in sampling: see `inference.denoising.denoise_step`."""
  batch = draw_batch(patch)
  drawn = draw_latents(batch, jax.random.key(0), CONFIG._replace(patch=patch))
  seen = []

  def denoise(x, _):
    seen.append(x)
    return drawn.noise

  v_loss(denoise, drawn, jnp.full(batch.grids.shape[:2], 700), batch, NOISE)
  noised = add_noise(drawn.x0, drawn.noise, NOISE.alpha(jnp.int32(700)))
  for segment in (1, 2, 3):
    both, latents, image = (
      vision(batch, np.asarray(x), 0, segment, patch) for x in (seen[0], noised, drawn.image)
    )
    np.testing.assert_allclose(both, np.concatenate([latents, image], axis=-1), atol=1e-5)
