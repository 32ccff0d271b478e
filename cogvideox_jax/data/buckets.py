"""Which (frames, height, width) a clip is brought to at a stage of training."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from cogvideox_jax.data.video import VideoInfo
from cogvideox_jax.errors import UserError


class Bucket(NamedTuple):
  num_frames: int  # Pixel frames, 4k+1.
  height: int  # Pixels, as is width.
  width: int


def check(sizes: Sequence[tuple[int, int]], durations: Sequence[int], *, multiple_of: int) -> None:
  """Raises UserError if the models cannot take a bucket.

  sizes: (height, width) in pixels. durations: pixel frames. multiple_of: what a side must divide
  by, which is the VAE's spatial compression times the transformer's patch.
  """
  if not sizes or not durations:
    raise UserError("a stage needs at least one size and one duration; add one to its config.")
  for num_frames in durations:
    if num_frames < 1 or num_frames % 4 != 1:
      below = max(1, (num_frames - 1) // 4 * 4 + 1)
      raise UserError(
        f"a duration of {num_frames} frames is not 4k+1: the first frame is compressed alone, the "
        f"others four at a time.\nUse {below} or {below + 4} frames."
      )
  for height, width in sizes:
    if height < 1 or width < 1 or height % multiple_of or width % multiple_of:
      near = [max(1, round(side / multiple_of)) * multiple_of for side in (height, width)]
      raise UserError(
        f"a size of {height}x{width} (height x width) pixels is not a multiple of {multiple_of}, "
        f"which the VAE and the patches divide by.\nThe nearest size is {near[0]}x{near[1]}."
      )


def assign(
  info: VideoInfo, sizes: Sequence[tuple[int, int]], durations: Sequence[int], fps: float
) -> Bucket | None:
  """The bucket of nearest shape, and of the longest duration that the video has at fps.

  Nearest by the ratio of the two aspects, so that least is cropped; of equal shapes, the one
  nearest in size. None if the video is shorter than every duration.
  """
  available = info.frames_at(fps)
  fitting = [num_frames for num_frames in durations if num_frames <= available]
  if not fitting:
    return None

  def distance(size: tuple[int, int]) -> tuple[float, float]:
    height, width = size
    shape = abs(math.log(width * info.height / (height * info.width)))
    return round(shape, 6), abs(math.log(width * height / (info.width * info.height)))

  return Bucket(max(fitting), *min(sizes, key=distance))
