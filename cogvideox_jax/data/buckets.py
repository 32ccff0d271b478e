"""Which (frames, height, width) a video is brought to at a stage of training, and how it is cut."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from cogvideox_jax.data.media import VideoError
from cogvideox_jax.data.video import VideoInfo, Window
from cogvideox_jax.errors import UserError

# Above it a video would teach the model blur that the stage's size is meant to be free of. Ours.
MAX_ENLARGEMENT = 1.5


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
) -> Bucket:
  """The bucket of nearest shape, and of the longest duration that the video has at fps.

  A size counts only if the video is enlarged MAX_ENLARGEMENT times at most to cover it. Nearest is
  by the ratio of the two aspects, so that least is cropped; of equal shapes, the nearest in size.
  Raises VideoError if the video is shorter than every duration, or too small for every size.
  """
  available = info.frames_at(fps)
  fitting = [num_frames for num_frames in durations if num_frames <= available]
  if not fitting:
    shortest = f"{min(durations)} frames at {fps:g} frames a second"
    raise VideoError(f"{info.seconds:.2f} s is shorter than {shortest}")
  return Bucket(max(fitting), *_nearest_size(info, sizes))


def cut(
  info: VideoInfo, sizes: Sequence[tuple[int, int]], durations: Sequence[int], fps: float
) -> list[Window]:
  """What to read of a video: clips one after the other, none of a frame that another has.

  Each is as long as the rest of the video allows, so that the longest come first. The last frames,
  too few for a duration above 1, are left out: a still of a video that is there already teaches
  nothing. Raises VideoError as `assign`.
  """
  num_frames, *size = assign(info, sizes, durations, fps)
  windows = [Window(0, num_frames, *size)]
  end, available = num_frames, info.frames_at(fps)
  while fitting := [frames for frames in durations if 1 < frames <= available - end]:
    windows.append(Window(end, max(fitting), *size))
    end += max(fitting)
  return windows


def _nearest_size(info: VideoInfo, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
  def enlargement(size: tuple[int, int]) -> float:
    return max(size[0] / info.height, size[1] / info.width)

  def distance(size: tuple[int, int]) -> tuple[float, float]:
    height, width = size
    shape = abs(math.log(width * info.height / (height * info.width)))
    return round(shape, 6), abs(math.log(width * height / (info.width * info.height)))

  sharp = [size for size in sizes if enlargement(size) <= MAX_ENLARGEMENT]
  if not sharp:
    height, width = nearest = min(sizes, key=enlargement)
    raise VideoError(
      f"{info.height}x{info.width} (height x width) pixels would be enlarged "
      f"{enlargement(nearest):.1f} times to {height}x{width}; {MAX_ENLARGEMENT:g} is the most"
    )
  return min(sharp, key=distance)
