"""Chooses the (frames, height, width) of a video at a stage of training, and cuts it into clips."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from cogvideox_jax.data.media import VideoError
from cogvideox_jax.data.video import VideoInfo, Window
from cogvideox_jax.errors import UserError

# A video that is enlarged more is left out, because it would teach the model blur. Ours.
MAX_ENLARGEMENT = 1.5
# The longest clips are given up for shorter ones if that saves this fraction of a video's frames.
# With 0, 81 frames would become nine clips of 9 rather than clips of 49, 9, 9 and 9. Ours.
WORTH_A_CLIP = 0.1


class Bucket(NamedTuple):
  """The size of a clip, in pixels."""

  num_frames: int  # 4k+1.
  height: int
  width: int


def check(sizes: Sequence[tuple[int, int]], durations: Sequence[int], *, multiple_of: int) -> None:
  """Raises UserError if the models cannot take a bucket of these sizes and durations.

  Args:
    sizes: (height, width) in pixels.
    durations: pixel frames.
    multiple_of: a side must be a multiple of it; the VAE's spatial compression times the
      transformer's patch.
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


def check_restored(durations: Sequence[int], compression: int) -> None:
  """Raises UserError if the VAE would decode a clip to more frames than it has.

  It does from an even number of latent frames, as diffusers does: then no frame stands alone.

  Args:
    durations: pixel frames, each 4k+1.
    compression: the VAE's in time.
  """
  step = math.lcm(4, 2 * compression)
  for num_frames in durations:
    latents = -(-(num_frames - 1) // compression) + 1
    if num_frames > 1 and (num_frames - 1) % step:
      below = (num_frames - 1) // step * step + 1
      raise UserError(
        f"a duration of {num_frames} frames gives {latents} latent frames, which the VAE decodes "
        f"to {compression * latents} frames, not {num_frames}.\n"
        f"Use {below} or {below + step} frames, so that latent frames are odd in number."
      )


def assign(
  info: VideoInfo, sizes: Sequence[tuple[int, int]], durations: Sequence[int], fps: float
) -> Bucket:
  """Returns the bucket of the nearest size, with the longest duration that the video has at fps.

  A size is possible only if the video covers it when enlarged at most MAX_ENLARGEMENT times. The
  nearest has the aspect ratio closest to the video's, so that the least is cropped; if several have
  the same aspect ratio, it is the one closest in area.

  Raises:
    VideoError: the video is shorter than every duration, or too small for every size.
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
  """Cuts a video into clips that follow one another and share no frame.

  It takes the longest duration as often as it fits, and cuts the rest so that the fewest frames are
  left over, in the fewest clips; the longest come first. It takes fewer of the longest if that
  saves WORTH_A_CLIP of the frames. If the last frames are too few for a duration above 1, they are
  left out: a still of a video that is already in the data teaches nothing. Raises VideoError as
  `assign` does.
  """
  first, *size = assign(info, sizes, durations, fps)
  available, moving = info.frames_at(fps), [frames for frames in durations if frames > 1]
  if first == 1:
    return [Window(0, 1, *size)]
  lengths = _lengths(available, moving)
  starts = accumulate(lengths, initial=0)
  return [Window(start, length, *size) for start, length in zip(starts, lengths, strict=False)]


def _lengths(frames: int, durations: Sequence[int]) -> list[int]:
  """Returns the lengths of a video's clips, as `cut` chooses them."""
  longest = max(durations)
  whole, rest = divmod(frames, longest)
  lengths = [longest] * whole + _least_waste(rest, durations)
  if frames - sum(lengths) < WORTH_A_CLIP * frames:
    return lengths
  # Few longest clips fit here, because less than one of them is left over.
  cuts = [
    [longest] * count + _least_waste(frames - longest * count, durations)
    for count in range(whole, -1, -1)
  ]
  most = max(map(sum, cuts))
  return next(cut for cut in cuts if most - sum(cut) < WORTH_A_CLIP * frames)


def _least_waste(frames: int, durations: Sequence[int]) -> list[int]:
  """Returns durations of the largest sum up to `frames`, as few as possible, in falling order."""
  best: list[list[int]] = [[]]  # For each number of frames.

  def rank(lengths: list[int]) -> tuple[int, int, list[int]]:
    return sum(lengths), -len(lengths), lengths

  for number in range(1, frames + 1):
    cuts = [[length, *best[number - length]] for length in durations if length <= number]
    best.append(max([best[-1], *(sorted(cut, reverse=True) for cut in cuts)], key=rank))
  return best[frames]


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
