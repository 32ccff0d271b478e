"""Converts a caller's images and videos, in any of the usual forms, to arrays in [-1, 1].

An image is a PIL image or an array [H W 3]; a video is a list of PIL images or an array [F H W 3].
Arrays hold bytes, or floats in [0, 1].
"""

import warnings
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image

from cogvideox_jax.errors import UserError
from cogvideox_jax.inference.size import Size

_SLACK = 1e-3  # Rounding beyond [-1, 1] that is let pass.


def images(given: Any, count: int, size: Size) -> Float[np.ndarray, "b H W 3"]:
  """Converts one image for all of `count` prompts, or a list or array of one for each.

  Raises:
    UserError: they are not images, or there are too few or too many.
  """
  _check_given("image", given)
  if isinstance(given, Image.Image) or (not isinstance(given, Sequence) and np.ndim(given) == 3):
    given = [given]
  return _each("image", list(given), count, size)[:, 0]


def videos(given: Any, count: int, size: Size) -> Float[np.ndarray, "b F H W 3"]:
  """Converts one video for all of `count` prompts, or a list or array of one for each.

  Raises:
    UserError: they are not videos, differ in length, or there are too few or too many.
  """
  _check_given("video", given)
  return _each("video", [given] if _is_video(given) else list(given), count, size)


def count_frames(given: Any) -> int:
  """The number of frames of the first video."""
  return len(given) if _is_video(given) else len(given[0])


def _check_given(name: str, given: Any) -> None:
  """Raises UserError if there is nothing."""
  if given is None or len(given if isinstance(given, Sequence | np.ndarray) else [given]) == 0:
    raise UserError(f"{name} is {given!r}: pass at least one.")


def _is_video(given: Any) -> bool:
  if isinstance(given, Sequence):
    return isinstance(given[0], Image.Image) or np.ndim(given[0]) == 3
  return given.ndim == 4


def _each(name: str, given: list, count: int, size: Size) -> Float[np.ndarray, "b F H W 3"]:
  if len(given) not in (1, count):
    raise UserError(f"{len(given)} {name}s for {count} prompts: pass one, or one for each prompt.")
  clips = [_signed(_frames(name, clip, size)) for clip in given]
  if len({len(clip) for clip in clips}) > 1:
    raise UserError(f"The {name}s have different numbers of frames; they must have the same.")
  return np.stack(clips * (count if len(clips) == 1 else 1))


def _frames(name: str, clip: Any, size: Size) -> Float[np.ndarray, "F H W 3"]:
  """Resizes PIL images with Lanczos and arrays to the nearest pixel, as diffusers does."""
  if isinstance(clip, Image.Image):
    clip = [clip]
  _check_sizes(name, clip)
  if isinstance(clip, Sequence) and isinstance(clip[0], Image.Image):
    box = (size.width, size.height)
    resized = [frame.convert("RGB").resize(box, Image.Resampling.LANCZOS) for frame in clip]
    return np.stack([np.asarray(frame, np.float32) for frame in resized]) / 255
  frames = np.asarray(clip)
  if frames.ndim == 3:
    frames = frames[None]
  if frames.ndim != 4 or frames.shape[-1] != 3:
    raise UserError(
      f"{name} is an array of shape {np.shape(clip)}; it must end in height, width and 3 channels."
    )
  _check_range(name, frames)
  scale = 255 if frames.dtype == np.uint8 else 1
  return _nearest(frames, size).astype(np.float32) / scale


def _check_sizes(name: str, clip: Any) -> None:
  """Raises UserError for an empty list, and for frames of unequal sizes."""
  if not isinstance(clip, Sequence):
    return
  sizes = {frame.size if isinstance(frame, Image.Image) else np.shape(frame) for frame in clip}
  if len(sizes) != 1:
    listed = ", ".join(map(str, sorted(sizes)[:3])) or "no frames"
    raise UserError(f"{name} has frames of unequal sizes ({listed}): give all the same size.")


def _check_range(name: str, frames: Shaped[np.ndarray, "F H W 3"]) -> None:
  """Raises UserError for arrays that are neither bytes nor floats in [0, 1] or [-1, 1]."""
  advice = "give bytes (uint8), or floats from 0 to 1."
  if frames.dtype != np.uint8 and not jnp.issubdtype(frames.dtype, jnp.floating):
    raise UserError(f"{name} is an array of {frames.dtype}: {advice}")
  if frames.dtype != np.uint8 and not (frames.min() >= -1 - _SLACK and frames.max() <= 1 + _SLACK):
    low, high = float(frames.min()), float(frames.max())
    raise UserError(f"{name} has pixels from {low:g} to {high:g}: {advice}")


def _nearest(frames: Shaped[np.ndarray, "F h w 3"], size: Size) -> Shaped[np.ndarray, "F H W 3"]:
  rows, columns = (
    np.arange(new) * old // new
    for new, old in zip((size.height, size.width), frames.shape[1:3], strict=True)
  )
  return frames[:, rows][:, :, columns]


def _signed(frames: Float[np.ndarray, "F H W 3"]) -> Float[np.ndarray, "F H W 3"]:
  """Maps [0, 1] to [-1, 1]; a clip with values below 0 is left as it is, as in diffusers."""
  if frames.min() < 0:
    warnings.warn("Pixels below 0: they are taken to be in [-1, 1] already.", stacklevel=4)
    return frames
  return 2 * frames - 1
