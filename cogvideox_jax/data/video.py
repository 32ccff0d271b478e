"""Reads frames of video and image files that may be hostile.

Decoding processes import only this file and those that it imports, so they need only numpy, PyAV
and PIL. Frames are decoded one at a time, and only the wanted ones are kept.
"""

import heapq
import math
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

import av
import numpy as np
from jaxtyping import UInt8

from cogvideox_jax.data import stills
from cogvideox_jax.data.colours import unreadable
from cogvideox_jax.data.media import (
  DEFAULT_LIMITS,
  Film,
  Limits,
  VideoError,
  check_size,
  is_image,
  open_video,
)
from cogvideox_jax.data.probing import SLACK, VideoInfo, probe
from cogvideox_jax.data.upright import Picture, fit, screen_of, upright

__all__ = [
  "VideoError",
  "VideoInfo",
  "Window",
  "probe",
  "read",
  "read_windows",
  "resample",
]

_TAIL = 0.1  # Seconds by which a file's packets may last longer than its frames.
_SKIP = 2.0  # Seconds before the first wanted frame from which on the decoder skips to a keyframe.

_Frame = TypeVar("_Frame")


class Window(NamedTuple):
  """Consecutive frames to read, counted at the wanted frame rate, and the size to bring them to."""

  start: int  # The first frame.
  num_frames: int
  height: int
  width: int


def read(
  path: str | os.PathLike[str],
  *,
  fps: float,
  num_frames: int,
  height: int,
  width: int,
  limits: Limits = DEFAULT_LIMITS,
) -> UInt8[np.ndarray, "F H W 3"]:
  """Returns the first num_frames frames at fps as RGB, brought to a size as `read_windows` does."""
  frames = np.empty((num_frames, height, width, 3), np.uint8)
  window = Window(0, num_frames, height, width)
  for index, (_, frame) in enumerate(read_windows(path, [window], fps=fps, limits=limits)):
    frames[index] = frame
  return frames


def read_windows(
  path: str | os.PathLike[str],
  windows: Sequence[Window],
  *,
  fps: float,
  limits: Limits = DEFAULT_LIMITS,
) -> Iterator[tuple[int, UInt8[np.ndarray, "H W 3"]]]:
  """Yields the frames of all windows in the order of time, and decodes the file only once.

  What comes long before the first window is skipped, from keyframe to keyframe.

  Frame i at fps is the one that the file shows at i/fps seconds. It is scaled to cover the window's
  size, with a filter against aliasing, and cropped at the centre; it is never stretched. A frame
  that already has the size is not changed.

  Yields:
    (index of the window, frame).

  Raises:
    VideoError: the file cannot be used, or turns out to be too short.
  """
  begin = min(window.start for window in windows)
  end = max(window.start + window.num_frames for window in windows)
  sizes = [(window.height, window.width) for window in windows]
  for index, picture in _pictures(path, fps, begin, end, sizes, limits):
    fitted: dict[tuple[int, int], np.ndarray] = {}
    for number, window in enumerate(windows):
      if window.start <= index < window.start + window.num_frames:
        size = window.height, window.width
        if size not in fitted:
          fitted[size] = fit(picture, *size)
        yield number, fitted[size]


def _pictures(
  path: str | os.PathLike[str],
  fps: float,
  begin: int,
  end: int,
  sizes: Sequence[tuple[int, int]],
  limits: Limits,
) -> Iterator[tuple[int, Picture]]:
  """Yields (index, picture) from frame `begin` up to `end` of a file at fps.

  Raises VideoError at the end if the file is too short.
  """
  count, screen = 0, None
  if is_image(path):
    with stills.open_picture(path, limits) as image:
      if stills.is_animation(image):
        shown = resample(stills.animation(image, sizes), fps, end)
      else:
        shown = iter([stills.load(image, sizes)])
      for picture in shown:
        if count >= begin:
          yield count, picture
        count += 1
  else:
    with open_video(path, limits) as film:
      budget = int((end / fps + 1) * limits.max_fps)
      budget = min(limits.max_frames or budget, budget)
      for frame in resample(_timed(film, begin / fps, budget, limits), fps, end):
        screen = screen or screen_of(frame, film.stream)
        picture = upright(frame, screen, sizes) if count >= begin else None
        del frame  # Each reference to a frame keeps it in memory.
        if picture:
          yield count, picture
        count += 1
  if count < end:
    raise VideoError(f"too short: {count} of {end} frames at {fps:g} fps")


def resample(
  timed: Iterator[tuple[float, float, _Frame]], fps: float, num_frames: int
) -> Iterator[_Frame]:
  """Yields the frame that is shown at i/fps seconds for each i, up to num_frames or the end.

  It holds one frame at a time.

  Args:
    timed: when each frame is shown and for how long, in seconds, and the frame.
  """
  held, start, time, last, given = None, 0.0, 0.0, 0.0, 0
  for time, lasts, frame in timed:
    last = lasts
    start = time if held is None else start
    while held is not None and given < num_frames and given / fps < time - start - SLACK:
      yield held
      given += 1
    if given == num_frames:
      return
    held = frame
  if held is not None:
    shown = max(last, 0.5 / fps)  # See `VideoInfo.frames_at`.
    while given < num_frames and given / fps < time - start + shown + _TAIL:
      yield held
      given += 1


def _timed(
  film: Film, skipped: float, budget: int, limits: Limits
) -> Iterator[tuple[float, float, av.VideoFrame]]:
  """Yields frames as `_decode` does, with their times as `resample` takes them.

  It uses the timestamps, because the file's own rate may vary.

  Args:
    budget: the most frames to decode.
  """
  time = 0.0
  for index, (seconds, frame) in enumerate(_decode(film, skipped)):
    check_size(frame.width, frame.height, limits.max_pixels)
    if frame.is_corrupt:
      raise VideoError(f"damaged at frame {index + 1}")
    if index == budget:
      raise VideoError(f"more than {budget} frames in {time:.1f} seconds")
    if reason := unreadable(frame):
      raise VideoError(reason)
    time = index / float(film.stream.average_rate or 25) if seconds is None else seconds
    yield time, float(frame.duration * (frame.time_base or 0)), frame


def _decode(film: Film, skipped: float) -> Iterator[tuple[float | None, av.VideoFrame]]:
  """Yields the first frame, then all frames from a keyframe on that is shown before `skipped` ends.

  Before each it yields the second at which it is shown. It yields all frames if there is no such
  keyframe, or nothing to skip.

  Args:
    skipped: seconds, counted from the first frame.
  """
  frames, start = _frames(film), None
  for start, frame in islice(frames, 1):
    yield start, frame
    del frame
  reordered = _lacks_times(film) and film.stream.codec_context.has_b_frames
  if skipped > _SKIP and start is not None and not reordered:
    latest = start + skipped - _TAIL
    frames = _seek(film, latest)
    landed = None
    for landed, frame in islice(frames, 1):
      if landed is not None and landed <= latest:
        yield landed, frame
      del frame
    if landed is None or landed > latest:  # The file's index is wrong.
      frames = _seek(film, start)
  yield from frames


def _seek(film: Film, seconds: float) -> Iterator[tuple[float | None, av.VideoFrame]]:
  """Decodes from the last keyframe on that the file's index knows at or before an instant."""
  unit = float(film.stream.time_base or 1)
  film.container.seek(math.floor(seconds / unit), stream=film.stream)
  film.flush()
  return _frames(film)


def _frames(film: Film) -> Iterator[tuple[float | None, av.VideoFrame]]:
  """Yields each frame, in the order in which they are shown, and the second at which it is."""
  container, stream, *_ = film
  if not _lacks_times(film):
    for packet in container.demux(stream):
      yield from ((frame.time, frame) for frame in film.decode(packet))
    return
  # Frames come in the order of time, so the next has the earliest time that none has yet. If they
  # are decoded in another order, FFmpeg guesses the packets' pts; else their dts are right.
  reordered, times = stream.codec_context.has_b_frames, []
  for packet in container.demux(stream):
    time = packet.pts if reordered else packet.dts
    if time is not None:
      heapq.heappush(times, time)
    for frame in film.decode(packet):
      yield heapq.heappop(times) * float(stream.time_base or 0) if times else None, frame


def _lacks_times(film: Film) -> bool:
  """Returns whether a file says when it is to decode a frame, but not when to show it."""
  return film.container.format.name == "avi"
