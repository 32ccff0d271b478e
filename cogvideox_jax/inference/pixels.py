"""Converts a caller's images and videos, in any of the usual forms, to arrays in [-1, 1].

An image is a PIL image or an array [H W 3]; a video is a list of PIL images or an array [F H W 3].
Arrays hold bytes, or floats in [0, 1].
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image

from cogvideox_jax.errors import UserError
from cogvideox_jax.inference.size import Size


def images(given: Any, count: int, size: Size) -> Float[np.ndarray, "b H W 3"]:
  """Converts one image for all of `count` prompts, or a list or array of one for each.

  Raises:
    UserError: they are not images, or there are too few or too many.
  """
  if isinstance(given, Image.Image) or np.ndim(given) == 3:
    given = [given]
  return _each("image", list(given), count, size)[:, 0]


def videos(given: Any, count: int, size: Size) -> Float[np.ndarray, "b F H W 3"]:
  """Converts one video for all of `count` prompts, or a list or array of one for each.

  Raises:
    UserError: they are not videos, differ in length, or there are too few or too many.
  """
  return _each("video", [given] if _is_video(given) else list(given), count, size)


def count_frames(given: Any) -> int:
  """The number of frames of the first video."""
  return len(given) if _is_video(given) else len(given[0])


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
  scale = 255 if frames.dtype == np.uint8 else 1
  return _nearest(frames, size).astype(np.float32) / scale


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
