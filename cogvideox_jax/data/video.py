"""Reads frames of video and image files that may be hostile.

Decoding processes import only this file and media.py, so they need only numpy, PyAV and PIL.
Frames are decoded one at a time, and only the wanted ones are kept.
"""

import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Colorspace, Interpolation
from av.video.stream import VideoStream
from jaxtyping import UInt8
from PIL import Image

from cogvideox_jax.data.media import (
  DEFAULT_LIMITS,
  Limits,
  VideoError,
  check_size,
  is_image,
  load_image,
  open_video,
)

_SLACK = 1e-3  # Seconds: Matroska rounds its timestamps to milliseconds.
_TAIL = 0.1  # Seconds by which a file's packets may last longer than its frames.
_SKIP = 2.0  # Seconds before the first wanted frame from which on the decoder skips to a keyframe.
_UNTAGGED = 2  # FFmpeg's number for "the file names no colour space".
# How colours are converted: the same bytes on every machine.
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


class VideoInfo(NamedTuple):
  """A video as players show it: upright, with square pixels.

  An image has 1 frame, 0 fps and 0 seconds.
  """

  num_frames: int
  height: int
  width: int
  fps: float  # The mean over the file, whose own rate may vary.
  seconds: float

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
    image = load_image(path, limits)
    return VideoInfo(1, image.height, image.width, 0.0, 0.0)
  with open_video(path, limits) as (container, stream):
    return _measure(container, stream, limits)


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
  for index, image, shown in _frames(path, fps, begin, end, limits):
    fitted: dict[tuple[int, int], np.ndarray] = {}
    for number, window in enumerate(windows):
      if window.start <= index < window.start + window.num_frames:
        size = window.height, window.width
        if size not in fitted:
          fitted[size] = _fit(image, shown, *size)
        yield number, fitted[size]


def _measure(container: InputContainer, stream: VideoStream, limits: Limits) -> VideoInfo:
  """Measures the size by the first frame, and the length by the packets."""
  first, packets, shown, start, end = None, 0, 0, math.inf, -math.inf
  for packet in container.demux(stream):
    if first is None:
      first = next(iter(packet.decode()), None)
    if not packet.size:
      continue  # The last one, which flushes the decoder.
    packets += 1
    if packet.is_corrupt:
      raise VideoError(f"damaged at packet {packets}")
    if packets > limits.max_frames:
      raise VideoError(f"more than {limits.max_frames} frames")
    time = packet.pts if packet.pts is not None else packet.dts
    if time is None or packet.is_discard:
      continue  # Outside what the file's edit list shows.
    shown += 1
    start, end = min(start, time), max(end, time + (packet.duration or 0))
  if first is None or not shown:
    raise VideoError("holds no frame")
  if packets < stream.frames:
    raise VideoError(f"cut short: {packets} of {stream.frames} frames")
  seconds = (end - start) * float(stream.time_base or 0)
  if seconds > limits.max_seconds:
    raise VideoError(f"{seconds:.0f} seconds; a video may have {limits.max_seconds:.0f}")
  if shown > 1 and shown > seconds * limits.max_fps:
    raise VideoError(f"more than {limits.max_fps:g} frames a second")
  _, (width, height) = _upright(first, stream)
  return VideoInfo(shown, height, width, shown / seconds if seconds else 0.0, seconds)


def _frames(
  path: str | os.PathLike[str], fps: float, begin: int, end: int, limits: Limits
) -> Iterator[tuple[int, Image.Image, tuple[int, int]]]:
  """Yields frame `begin` up to `end` of a file at fps: (index, upright image, size as shown).

  A size is (width, height). Raises VideoError at the end if the file is too short.
  """
  count = 0
  if is_image(path):
    image, count = load_image(path, limits), 1
    if begin == 0:
      yield 0, image, image.size
  else:
    with open_video(path, limits) as (container, stream):
      for frame in _resample(container, stream, fps, begin, end, limits):
        if count >= begin:
          yield count, *_upright(frame, stream)
        count += 1
  if count < end:
    raise VideoError(f"too short: {count} of {end} frames at {fps:g} fps")


def _resample(
  container: InputContainer,
  stream: VideoStream,
  fps: float,
  begin: int,
  num_frames: int,
  limits: Limits,
) -> Iterator[av.VideoFrame]:
  """Yields the frame that is shown at i/fps seconds for each i, up to num_frames or the end.

  Before i = begin it may yield other frames. It holds one frame at a time. It uses the timestamps,
  because the file's own rate may vary.
  """
  budget = min(limits.max_frames, int((num_frames / fps + 1) * limits.max_fps))
  held, start, time, given = None, 0.0, 0.0, 0
  for index, frame in enumerate(_decode(container, stream, begin / fps)):
    check_size(frame.width, frame.height, limits)
    if frame.is_corrupt:
      raise VideoError(f"damaged at frame {index + 1}")
    if index == budget:
      raise VideoError(f"more than {budget} frames in {time:.1f} seconds")
    # AVI has no timestamps.
    time = index / float(stream.average_rate or 25) if frame.time is None else frame.time
    start = start if held else time
    while held and given < num_frames and given / fps < time - start - _SLACK:
      yield held
      given += 1
    if given == num_frames:
      return
    held = frame
  if held:
    shown = max(float(held.duration * (held.time_base or 0)), 0.5 / fps)  # See `frames_at`.
    while given < num_frames and given / fps < time - start + shown + _TAIL:
      yield held
      given += 1


def _decode(
  container: InputContainer, stream: VideoStream, skipped: float
) -> Iterator[av.VideoFrame]:
  """Yields the first frame, then all frames from a keyframe on that is shown before `skipped` ends.

  It yields all frames if there is no such keyframe, or nothing to skip.

  Args:
    skipped: seconds, counted from the first frame.
  """
  frames = container.decode(stream)
  first = next(frames, None)
  if first is None:
    return
  yield first
  if skipped > _SKIP and first.time is not None and first.pts is not None:
    latest = first.time + skipped - _TAIL
    frames = _seek(container, stream, latest)
    landed = next(frames, None)
    if landed and landed.time is not None and landed.time <= latest:
      yield landed
    else:  # The file's index is wrong.
      frames = _seek(container, stream, first.time)
  yield from frames


def _seek(
  container: InputContainer, stream: VideoStream, seconds: float
) -> Iterator[av.VideoFrame]:
  """Decodes from the last keyframe on that the file's index knows at or before an instant."""
  container.seek(math.floor(seconds / float(stream.time_base or 1)), stream=stream)
  return container.decode(stream)


def _upright(frame: av.VideoFrame, stream: VideoStream) -> tuple[Image.Image, tuple[int, int]]:
  """Returns the frame as RGB, rotated as its display matrix says, and its (width, height) as shown.

  If pixels are not square, the size as shown is not that of the array.
  """
  untagged_hd = frame.colorspace == _UNTAGGED and frame.height > 576
  rgb = frame.to_ndarray(
    format="rgb24",
    src_colorspace=Colorspace.ITU709 if untagged_hd else None,  # As players do.
    interpolation=EXACT | Interpolation.FULL_CHR_H_INT,
    threads=1,
  )
  if frame.interlaced_frame and frame.height > 1:
    rgb = rgb[::2]  # Keep one field, because the other shows another instant.
  width = max(1, round(frame.width * (stream.sample_aspect_ratio or 1)))
  quarters = round(frame.rotation / 90) % 4
  size = (frame.height, width) if quarters % 2 else (width, frame.height)
  return Image.fromarray(np.ascontiguousarray(np.rot90(rgb, quarters))), size


def _fit(
  image: Image.Image, shown: tuple[int, int], height: int, width: int
) -> UInt8[np.ndarray, "H W 3"]:
  """Scales an image to cover a size and crops it at the centre.

  Only the crop is scaled, so a long thin image costs no more than any other.

  Args:
    shown: (width, height) of the image on a screen.
  """
  shown_width, shown_height = shown
  crop_width = min(shown_width, shown_height * width / height)
  crop_height = min(shown_height, shown_width * height / width)
  across = image.width * (1 - crop_width / shown_width) / 2
  down = image.height * (1 - crop_height / shown_height) / 2
  box = (across, down, image.width - across, image.height - down)
  return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=3.0))
