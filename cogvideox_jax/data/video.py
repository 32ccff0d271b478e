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
from cogvideox_jax.data.colours import SDR, transfer_of, unreadable
from cogvideox_jax.data.media import (
  DEFAULT_LIMITS,
  Film,
  Limits,
  VideoError,
  check_size,
  is_image,
  open_video,
)
from cogvideox_jax.data.upright import Picture, fit, screen_of, shown_size, upright

_SLACK = 1e-3  # Seconds: Matroska rounds its timestamps to milliseconds.
_TAIL = 0.1  # Seconds by which a file's packets may last longer than its frames.
_SKIP = 2.0  # Seconds before the first wanted frame from which on the decoder skips to a keyframe.
# A file of more than _LONG seconds, whose frames are shown for more than _STILL each on average,
# would give many clips of one picture.
_LONG, _STILL = 600.0, 10.0
_SMALL = [(16, 16)]  # The size to which a picture is decoded that is only measured.

_Frame = TypeVar("_Frame")


class VideoInfo(NamedTuple):
  """A video as players show it: upright, with square pixels.

  An image has 1 frame, 0 fps and 0 seconds.
  """

  num_frames: int
  height: int
  width: int
  fps: float  # The mean over the file, whose own rate may vary.
  seconds: float
  transfer: str = SDR  # What the file's light was coded with: colours.SDR, HLG or PQ.
  note: str = ""  # A line for the user; see media.Film.

  def frames_at(self, fps: float) -> int:
    """Returns how many frames `read` can give at a frame rate.

    Frame i shows the instant i/fps. The last may be up to half a frame later than the file's last
    frame, so that 6 seconds at 24 fps give the 49 frames at 8 fps (8n+1) that the models take.
    """
    if self.num_frames == 1:
      return 1
    shown = math.ceil((self.seconds - _SLACK) * fps)
    nearest = math.floor((self.seconds - 1 / self.fps) * fps + 0.5) + 1
    return max(shown, nearest)


class Window(NamedTuple):
  """Consecutive frames to read, counted at the wanted frame rate, and the size to bring them to."""

  start: int  # The first frame.
  num_frames: int
  height: int
  width: int


def probe(path: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> VideoInfo:
  """Measures a file. Reads all packets, because headers may lie, and decodes the first frame.

  Raises VideoError if the file cannot be used.
  """
  if is_image(path):
    return _measure_picture(path, limits)
  with open_video(path, limits) as film:
    return _measure(film, limits)


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


def _measure_picture(path: str | os.PathLike[str], limits: Limits) -> VideoInfo:
  """Decodes a picture, or every frame of an animation, as headers may lie."""
  with stills.open_picture(path, limits) as image:
    width, height = stills.shown_size(image)
    if not stills.is_animation(image):
      stills.load(image, _SMALL)
      return VideoInfo(1, height, width, 0.0, 0.0, stills.transfer_of(image))
    count, seconds, transfer = 0, 0.0, stills.transfer_of(image)
    for _, lasts, _ in stills.animation(image, _SMALL):
      count, seconds = count + 1, seconds + lasts
      _check_frames(count, limits)
  _check_seconds(seconds, limits)
  return VideoInfo(count, height, width, count / seconds, seconds, transfer)


def _measure(film: Film, limits: Limits) -> VideoInfo:
  """Measures the size by the first frame, and the length by the packets."""
  size, packets, shown, start, end = None, 0, 0, math.inf, -math.inf
  promised, stream, transfer = _promised(film), film.stream, SDR
  for packet in film.container.demux(stream):
    if size is None:
      for frame in film.decode(packet)[:1]:
        if reason := unreadable(frame):
          raise VideoError(reason)
        size, transfer = shown_size(frame, screen_of(frame, stream)), transfer_of(frame)
    if not packet.size:
      continue  # The last one, which flushes the decoder.
    packets += 1
    if packet.is_corrupt:
      raise VideoError(f"damaged at packet {packets}")
    _check_frames(packets, limits)
    time = packet.pts if packet.pts is not None else packet.dts
    if time is None or packet.is_discard:
      continue  # Outside what the file's edit list shows.
    shown += 1
    start, end = min(start, time), max(end, time + (packet.duration or 0))
  if size is None or not shown:
    raise VideoError("holds no frame")
  if packets < promised:
    raise VideoError(f"cut short: {packets} of {promised} frames")
  seconds = (end - start) * float(stream.time_base or 0)
  _check_seconds(seconds, limits)
  if seconds > _LONG and shown * _STILL < seconds:
    raise VideoError(f"shows {shown} frames in {seconds:.0f} seconds: it stands still")
  if shown > 1 and shown > seconds * limits.max_fps:
    raise VideoError(f"more than {limits.max_fps:g} frames a second")
  width, height = size
  fps = shown / seconds if seconds else 0.0
  return VideoInfo(shown, height, width, fps, seconds, transfer, film.note)


def _promised(film: Film) -> int:
  """Returns how many packets a file must have unless its end is missing; 0 if that is unknown.

  What the header counts is too much where an edit list drops packets, and where frames of an AVI
  have no packet because they repeat the one before. The index of an MP4 knows better.
  """
  if "mp4" in film.container.format.name:
    return sum(entry.size > 0 for entry in film.stream.index_entries)
  return film.stream.frames if film.cut_off else 0


def _check_frames(frames: int, limits: Limits) -> None:
  if limits.max_frames and frames > limits.max_frames:
    raise VideoError(f"more than {limits.max_frames} frames")


def _check_seconds(seconds: float, limits: Limits) -> None:
  if limits.max_seconds and seconds > limits.max_seconds:
    raise VideoError(f"{seconds:.0f} seconds; a video may have {limits.max_seconds:.0f}")


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
    while held is not None and given < num_frames and given / fps < time - start - _SLACK:
      yield held
      given += 1
    if given == num_frames:
      return
    held = frame
  if held is not None:
    shown = max(last, 0.5 / fps)  # See `frames_at`.
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
