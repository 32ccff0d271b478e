"""PSNR, SSIM and flicker beside scikit-image and by hand."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cogvideox_jax.errors import UserError
from cogvideox_jax.evaluation.quality import flicker, psnr, ssim, steadiness, to_bytes


def noisy_clip(height: int = 37, width: int = 52) -> tuple[np.ndarray, np.ndarray]:
  """Smooth frames that move, and the same with noise that grows from frame to frame."""
  draws = np.random.RandomState(0)
  y, x = np.mgrid[:height, :width]
  frames = [0.5 + 0.4 * np.stack([np.sin((x + t) / 5), np.cos(y / 7), x / width], -1)
            for t in range(3)]  # fmt: skip
  noise = [draws.normal(0, 0.03 * (t + 1), frames[0].shape) for t in range(3)]
  return to_bytes(np.stack(frames)), to_bytes(np.stack(frames) + np.stack(noise))


def test_psnr_equals_scikit_images():
  source, restored = noisy_clip()
  found = psnr(source, restored)
  pairs = list(zip(source, restored, strict=True))
  wanted = [peak_signal_noise_ratio(x / 255, y / 255, data_range=1) for x, y in pairs]
  assert found.of_frames == pytest.approx(np.mean(wanted), abs=1e-6)
  whole = peak_signal_noise_ratio(source / 255, restored / 255, data_range=1)
  assert found.of_clip == pytest.approx(whole, abs=1e-6)
  assert found.of_frames - found.of_clip > 0.5


def test_frames_of_30_and_20_decibels_have_25_or_22_6():
  source = np.zeros((2, 100, 100, 3), np.uint8)
  restored = source.copy()
  restored[0, :10, :10] = round(255 * 0.1**0.5)  # A hundredth of the places, error 0.1 each.
  restored[1, :, :10] = round(255 * 0.1**0.5)
  found = psnr(source, restored)
  assert found.of_frames == pytest.approx(25.0, abs=0.05)
  assert found.of_clip == pytest.approx(22.6, abs=0.05)


def test_the_psnr_of_equal_frames_is_finite():
  source, _ = noisy_clip()
  assert psnr(source, source) == (120, 120)
  nearly = source.copy()
  nearly[0, 0, 0, 0] ^= 1
  assert psnr(source, nearly).of_clip < 100


def test_frames_are_clipped_and_rounded():
  assert to_bytes(np.array([-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.5])[:, None, None, None]
                  .repeat(3, -1))[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 255, 255]  # fmt: skip


@pytest.mark.parametrize("size", [(37, 52), (11, 11), (64, 64)])
def test_ssim_equals_scikit_images(size):
  source, restored = noisy_clip(*size)
  wanted = [
    structural_similarity(
      x / 255,
      y / 255,
      data_range=1,
      channel_axis=-1,
      gaussian_weights=True,
      sigma=1.5,
      use_sample_covariance=False,
    )
    for x, y in zip(source, restored, strict=True)
  ]
  assert ssim(source, restored) == pytest.approx(np.mean(wanted), abs=1e-6)
  assert ssim(source, source) == pytest.approx(1, abs=1e-12)


def test_ssim_refuses_frames_smaller_than_its_window():
  source, restored = noisy_clip(10, 40)
  with pytest.raises(UserError, match="at least 11 pixels"):
    ssim(source, restored)


def test_flicker_is_the_mean_difference_of_neighbours():
  frames = np.zeros((3, 2, 2, 3), np.uint8)
  frames[1], frames[2] = 255, 250
  assert flicker(frames) == (255 + 5) / 2
  assert flicker(frames[:1]) is None
  assert [steadiness(x) for x in (0.0, 255.0, 51.0)] == [1, 0, 0.8]
