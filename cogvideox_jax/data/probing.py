"""Measures video and image files that may be hostile.

Decoding processes import only this file and those that it imports, so they need only numpy, PyAV
and PIL.
"""

import math
import os
from typing import NamedTuple

from cogvideox_jax.data import stills
from cogvideox_jax.data.colours import SDR, transfer_of, unreadable
from cogvideox_jax.data.media import (
  DEFAULT_LIMITS,
  Film,
  Limits,
  VideoError,
  is_image,
  open_video,
)
from cogvideox_jax.data.upright import screen_of, shown_size

SLACK = 1e-3  # Seconds: Matroska rounds its timestamps to milliseconds.
# A file of more than _LONG seconds, whose frames are shown for more than _STILL each on average,
# would give many clips of one picture.
_LONG, _STILL = 600.0, 10.0
_SMALL = [(16, 16)]  # The size to which a picture is decoded that is only measured.


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
    shown = math.ceil((self.seconds - SLACK) * fps)
    nearest = math.floor((self.seconds - 1 / self.fps) * fps + 0.5) + 1
    return max(shown, nearest)


def probe(path: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> VideoInfo:
  """Measures a file. Reads all packets, because headers may lie, and decodes the first frame.

  Raises VideoError if the file cannot be used.
  """
  if is_image(path):
    return _measure_picture(path, limits)
  with open_video(path, limits) as film:
    return _measure(film, limits)


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
