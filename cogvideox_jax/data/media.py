"""Opens video and image files that may be hostile.

A file is opened with limits and one decoder thread, and it cannot make the decoder open another
file or the network. Whatever is wrong with a file raises a `VideoError`.
"""

import io
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
from av.container import InputContainer
from av.error import ArgumentError, FFmpegError, InvalidDataError
from av.packet import Packet
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream
from PIL import Image, UnidentifiedImageError

from cogvideox_jax.config_keys import AT_LEAST_ZERO, key
from cogvideox_jax.data import dolby_vision, first_bytes, vp9
from cogvideox_jax.data.colours import DOLBY_VISION_5

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".apng", ".webp", ".avif", ".tif", ".tiff", ".bmp")
VIDEO_SUFFIXES = (
  *(".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".webm", ".mkv", ".avi", ".gif"),
  *(".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".vob", ".flv", ".wmv", ".asf", ".ogv", ".mxf"),
)

# Only containers: playlists (hls, concat, dash) would open further files.
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf"
# The exceptions that PyAV and PIL raise for damaged files, found by trying such files.
_FAULTS = (
  FFmpegError,
  Image.DecompressionBombError,
  Image.DecompressionBombWarning,
  OSError,
  ValueError,
  SyntaxError,
  EOFError,
  MemoryError,
  struct.error,
  zlib.error,
)


_UNKNOWN = (
  InvalidDataError,
  ArgumentError,
)  # What FFmpeg raises for containers that it may not read.


class VideoError(Exception):
  """A file cannot be used. The message is one line, without the file's name, for the quarantine."""


# The decoder of HEVC marks no frame as damaged, but leaves it out; so told, it fails instead.
_STRICT = {"err_detect": "crccheck+explode"}
_PICTURES = (first_bytes.HEIC, first_bytes.AVIF)
_STILLS = Disposition.attached_pic | Disposition.timed_thumbnails
_NO_LIMIT = "0: no limit."


@dataclass(frozen=True)
class Limits:
  """A file above any of these limits is refused."""

  max_pixels: int = field(
    default=36_000_000,
    metadata=key("Pixels of a video's frame; 8K passes if its decoder takes little memory."),
  )
  max_picture_pixels: int = field(
    default=256_000_000,
    metadata=key("Pixels of a picture. Large JPEGs are decoded at a part of their size."),
  )
  max_frames: int = field(
    default=0, metadata=key(f"Frames of a file. {_NO_LIMIT}", allowed=AT_LEAST_ZERO)
  )
  max_seconds: float = field(
    default=86_400.0, metadata=key(f"Seconds of a file. {_NO_LIMIT}", allowed=AT_LEAST_ZERO)
  )
  max_bytes: int = field(
    default=0, metadata=key(f"Bytes of a file. {_NO_LIMIT}", allowed=AT_LEAST_ZERO)
  )
  max_fps: float = field(
    default=1000.0,
    metadata=key("Frames a second, on average; more could keep a decoder busy for long."),
  )


DEFAULT_LIMITS = Limits()


def is_image(path: str | os.PathLike[str]) -> bool:
  """Returns whether the name of a file is that of an image."""
  return os.fspath(path).lower().endswith(IMAGE_SUFFIXES)


def as_path(path: str | os.PathLike[str]) -> Any:
  """Turns a string into a pathlib.Path. Any other path stays: an epath.Path may name a bucket."""
  return Path(path) if isinstance(path, str) else path


def not_a_file(path: str | os.PathLike[str]) -> str:
  """Returns why a path is not a regular file; empty if it is one.

  Ask before opening, because opening a pipe would wait.
  """
  file = as_path(path)
  if not file.exists():
    return "the file is absent"
  special = os.path.exists(path) and not os.path.isfile(path)  # epath takes a pipe for a file.
  return "not a regular file" if special or not file.is_file() else ""


@contextmanager
def opened(path: str | os.PathLike[str], limits: Limits) -> Iterator[BinaryIO]:
  """Opens a file within the limits. Any fault while it is open becomes a VideoError."""
  try:
    if reason := not_a_file(path):
      raise VideoError(reason)
    with as_path(path).open("rb") as file:
      size = file.seek(0, io.SEEK_END)
      if not 0 < size <= (limits.max_bytes or size):
        raise VideoError(f"{size} bytes; a file may have 1 to {limits.max_bytes or 'any number'}")
      file.seek(0)
      yield file
  except UnidentifiedImageError as error:  # Its message would name the file.
    known = _kind(path)
    raise VideoError(
      f"not a JPEG, PNG, WebP, AVIF, TIFF or BMP image{f', but {known}' if known else ''}"
    ) from error
  except _FAULTS as error:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    known = _kind(path) if isinstance(error, _UNKNOWN) else ""
    known = "" if known == first_bytes.VIDEO else known  # FFmpeg would say so, too.
    raise VideoError(
      f"cannot be decoded: {reason or type(error).__name__}{f'; it is {known}' if known else ''}"
    ) from error


def _kind(path: str | os.PathLike[str]) -> str:
  """Returns what a file is by its first bytes; empty if they do not say it, or not why it fails."""
  with as_path(path).open("rb") as file:
    return first_bytes.kind(file.read(first_bytes.LONGEST))


class Film(NamedTuple):
  """An open video file, and the stream that players show."""

  container: InputContainer
  stream: VideoStream
  cut_off: bool  # Whether the file is shorter than it says; False where the format does not say.
  note: str  # Which of several tracks it is; empty if there is one, beside cover art.
  decoder: VideoCodecContext | None  # Decodes the packets; None: the stream's own.

  def decode(self, packet: Packet) -> list[av.VideoFrame]:
    """Returns the frames that a packet completes."""
    if self.decoder is None:
      return packet.decode()  # pyright: ignore[reportReturnType] - a stream of video.
    return self.decoder.decode(packet if packet.size else None)

  def flush(self) -> None:
    """Forgets the packets before a seek; the container does so for the stream's own decoder."""
    if self.decoder is not None:
      self.decoder.flush_buffers()


@contextmanager
def open_video(path: str | os.PathLike[str], limits: Limits) -> Iterator[Film]:
  """Opens the film of a file (see `_film`), with one decoder thread."""
  options = {
    "max_pixels": str(limits.max_pixels),  # Opening a file may already allocate frames.
    "protocol_whitelist": "file",
    "format_whitelist": _DEMUXERS,
  }
  with opened(path, limits) as file:
    if (known := first_bytes.kind(file.read(first_bytes.LONGEST))) in _PICTURES:
      raise VideoError(f"it is {known}")  # FFmpeg would give one of its tiles.
    file.seek(0)
    cut_off = _avi_is_cut_off(file)
    if dolby_vision.profile(file) == 5:
      raise VideoError(DOLBY_VISION_5)
    with av.open(
      file, "r", options=options, metadata_errors="replace", buffer_size=2**18
    ) as container:
      stream, note = _film(container.streams.video)
      check_size(stream.width, stream.height, limits.max_pixels)
      stream.codec_context.options = {"max_pixels": options["max_pixels"]} | (
        _STRICT if stream.codec_context.name == "hevc" else {}
      )
      stream.codec_context.thread_count = 1
      decoder = vp9.decoder(file, container, stream, limits.max_pixels)
      yield Film(container, stream, cut_off, note, decoder)


def _avi_is_cut_off(file: BinaryIO) -> bool:
  """Returns whether an AVI is shorter than its first chunk. Leaves the file at its start."""
  kind, size, form = struct.unpack("<4sI4s", file.read(12).ljust(12, b"\0"))
  end = file.seek(0, io.SEEK_END)
  file.seek(0)
  # A recorder that was stopped leaves one of these sizes.
  return (kind, form) == (b"RIFF", b"AVI ") and size not in (0, 2**32 - 1) and 8 + size > end


def _film(streams: Sequence[VideoStream]) -> tuple[VideoStream, str]:
  """Returns the video stream that a person would call the film, and `Film.note`.

  Cover art comes last, then what is less than half as long as the longest; of the rest the largest
  is taken, then the longest, then the one that the file calls its default. The default does not
  come first, because encoders give that mark to the first track, whatever it is.
  """
  if not streams:
    raise VideoError("holds no video")
  known = [stream for stream in streams if stream.codec_context is not None]
  if not known:
    raise VideoError("its video codec is unknown")

  films = [stream for stream in known if not stream.disposition & _STILLS] or known
  longest = max(map(_seconds, films))
  film = max(
    (stream for stream in films if _seconds(stream) >= longest / 2),
    key=lambda stream: (
      stream.width * stream.height,
      _seconds(stream),
      bool(stream.disposition & Disposition.default),
      -stream.index,
    ),
  )
  used = f"of {len(films)} video tracks, number {films.index(film) + 1} is used"
  return film, f"{used}: {film.width}x{film.height} pixels" if films[1:] else ""


def _seconds(stream: VideoStream) -> float:
  """Returns how long a stream lasts; 0 if the file does not say."""
  # For Matroska FFmpeg gives some streams the duration of the file.
  said = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
  if not said:
    return float((stream.duration or 0) * (stream.time_base or 0))
  hours, minutes, seconds = map(float, said.groups())
  return 3600 * hours + 60 * minutes + seconds


def check_size(width: int, height: int, max_pixels: int) -> None:
  """Raises VideoError if a frame or picture has too many pixels, or none."""
  if not 0 < width * height <= max_pixels:
    # FFmpeg reports no size if only the decoder knows it, which the limit stopped.
    size = f"{width}x{height} pixels" if width * height else "an unknown number of pixels"
    raise VideoError(f"{size}; it may have 1 to {max_pixels}")
