"""Measures how near restored frames are to their source: PSNR, SSIM, flicker.

All take bytes, because a video file holds bytes: `to_bytes` clips and rounds frames of a network.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from cogvideox_jax.errors import UserError

# The mean squared error of [0, 1] frames below which PSNR is bounded, so that equal frames have a
# finite one. The error of a frame in which one byte of 6 million differs by one is above it.
SMALLEST_ERROR = 1e-12
# SSIM's window and constants (Wang et al. 2004; scikit-image with gaussian_weights=True).
SIGMA, RADIUS = 1.5, 5
C1, C2 = 0.01**2, 0.03**2  # For frames in [0, 1].

Frames = UInt8[np.ndarray, "F H W 3"]


class Psnr(NamedTuple):
  """PSNR in dB, in two ways that differ: frames of 30 and 20 dB have 25.0 and 22.6."""

  of_frames: float  # The mean of the frames' PSNR.
  of_clip: float  # That of the mean squared error of all frames.


def to_bytes(frames: Float[np.ndarray, "*b F H W 3"]) -> UInt8[np.ndarray, "*b F H W 3"]:
  """Rounds frames in [0, 1] to bytes; what is outside is clipped."""
  return np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8)


def psnr(source: Frames, restored: Frames) -> Psnr:
  """Returns the PSNR of restored frames; at most 120 dB."""
  return psnr_of(errors(source, restored))


def errors(source: Frames, restored: Frames) -> list[float]:
  """Returns the mean squared error of each frame, of values in [0, 1]."""
  pairs = zip(source, restored, strict=True)
  return [float(np.square(_unit(x) - _unit(y)).mean()) for x, y in pairs]


def psnr_of(errors: Sequence[float]) -> Psnr:
  """Returns the PSNR of frames with these squared errors."""
  return Psnr(float(_decibels(np.array(errors)).mean()), float(_decibels(np.mean(errors))))


def _decibels(error: np.ndarray | np.floating) -> np.ndarray | np.floating:
  return -10 * np.log10(np.maximum(error, SMALLEST_ERROR))


def check_size(height: int, width: int) -> None:
  """Raises UserError for frames that are smaller than the window of SSIM."""
  taps = 2 * RADIUS + 1
  if min(height, width) < taps:
    raise UserError(f"SSIM needs frames of at least {taps} pixels a side, not {height}x{width}.")


def ssim(source: Frames, restored: Frames) -> float:
  """Returns the mean SSIM of frames and colours; see `ssims`."""
  return float(np.mean(ssims(source, restored)))


def ssims(source: Frames, restored: Frames) -> list[float]:
  """Returns the SSIM of each frame, the mean over its colours.

  A Gaussian window of 11 taps with sigma 1.5, population covariance, a data range of 1, averaged
  where the window lies inside the frame.

  Raises:
    UserError: frames are smaller than the window.
  """
  height, width = source.shape[1:3]
  check_size(height, width)
  rows, columns = _windows(height), _windows(width)

  def smooth(x: np.ndarray) -> np.ndarray:
    return rows @ x @ columns.T

  pairs = zip(source, restored, strict=True)
  return [_ssim(_planes(x), _planes(y), smooth) for x, y in pairs]


def _ssim(x: np.ndarray, y: np.ndarray, smooth) -> float:
  """SSIM of the planes of a frame; `smooth` averages over the window around each place."""
  mean_x, mean_y = smooth(x), smooth(y)
  variances = smooth(x * x) - mean_x**2 + smooth(y * y) - mean_y**2
  covariance = smooth(x * y) - mean_x * mean_y
  means = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
  return float((means * (2 * covariance + C2) / (variances + C2)).mean())


def _windows(size: int) -> Float[np.ndarray, "places size"]:
  """Returns the weights of the window at each place where it lies inside `size` pixels."""
  taps = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
  places = size - 2 * RADIUS
  matrix = np.zeros((places, size))
  for place in range(places):
    matrix[place, place : place + len(taps)] = taps / taps.sum()
  return matrix


def flicker(frames: Frames) -> float | None:
  """Returns the mean absolute difference of neighbouring frames, on 0..255.

  None for a single frame. The paper's flickering (table 1) is of this kind, but on a scale that it
  does not give.
  """
  return float(np.mean(changes(frames))) if len(frames) > 1 else None


def changes(frames: Frames) -> list[float]:
  """Returns the mean absolute difference of each frame and the one before it, on 0..255."""
  pairs = itertools.pairwise(frames)
  return [float(np.abs(x.astype(np.int16) - y).mean()) for x, y in pairs]


def steadiness(flicker: float) -> float:
  """Returns VBench's temporal flickering of a flicker: in [0, 1], 1 for a still video."""
  return (255 - flicker) / 255


def _unit(frame: np.ndarray) -> np.ndarray:
  return frame.astype(np.float64) / 255


def _planes(frame: np.ndarray) -> np.ndarray:
  return np.moveaxis(_unit(frame), -1, 0)
