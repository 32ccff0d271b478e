"""Opens video and image files that may be hostile.

A file is opened with limits and one decoder thread, and it cannot make the decoder open another
file or the network. Whatever is wrong with a file raises a `VideoError`.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")

# Only containers: playlists (hls, concat, dash) would open further files.
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"
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


class VideoError(Exception):
  """A file cannot be used. The message is one line, without the file's name, for the quarantine."""


@dataclass(frozen=True)
class Limits:
  """A file above any of these limits is refused. Ours."""

  max_pixels: int = 8_900_000  # Per frame; 4K footage passes.
  max_frames: int = 20_000  # In the file.
  max_bytes: int = 2 * 1024**3  # The size of the file.
  max_seconds: float = 600.0
  max_fps: float = 240.0  # The file's average; a higher one could keep a decoder busy for long.


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
def _opened(path: str | os.PathLike[str], limits: Limits) -> Iterator[BinaryIO]:
  """Opens a file within the limits. Any fault while it is open becomes a VideoError."""
  try:
    if reason := not_a_file(path):
      raise VideoError(reason)
    with as_path(path).open("rb") as file:
      size = file.seek(0, io.SEEK_END)
      if not 0 < size <= limits.max_bytes:
        raise VideoError(f"{size} bytes; a file may have 1 to {limits.max_bytes}")
      file.seek(0)
      yield file
  except UnidentifiedImageError as error:  # Its message would name the file.
    raise VideoError("not a JPEG, PNG or WebP image") from error
  except _FAULTS as error:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    raise VideoError(f"cannot be decoded: {reason or type(error).__name__}") from error


def load_image(path: str | os.PathLike[str], limits: Limits) -> Image.Image:
  """Decodes an image as upright RGB; an animation gives its first frame."""
  with _opened(path, limits) as file, Image.open(file, formats=("JPEG", "PNG", "WEBP")) as image:
    check_size(image.width, image.height, limits)
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # PIL would make every value above 255 white.
      upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    return upright.convert("RGB")


@contextmanager
def open_video(
  path: str | os.PathLike[str], limits: Limits
) -> Iterator[tuple[InputContainer, VideoStream]]:
  """Opens the first video stream of a file, with one decoder thread."""
  options = {
    "max_pixels": str(limits.max_pixels),  # Opening a file may already allocate frames.
    "protocol_whitelist": "file",
    "format_whitelist": _DEMUXERS,
  }
  with (
    _opened(path, limits) as file,
    av.open(file, "r", options=options, metadata_errors="replace", buffer_size=2**18) as container,
  ):
    if not container.streams.video:
      raise VideoError("holds no video")
    stream = container.streams.video[0]
    if stream.codec_context is None:
      raise VideoError("its video codec is unknown")
    check_size(stream.width, stream.height, limits)
    stream.codec_context.options = {"max_pixels": options["max_pixels"]}
    stream.codec_context.thread_count = 1
    yield container, stream


def check_size(width: int, height: int, limits: Limits) -> None:
  """Raises VideoError if a frame has too many pixels, or none."""
  if not 0 < width * height <= limits.max_pixels:
    # FFmpeg reports no size if only the decoder knows it, which the limit stopped.
    size = f"{width}x{height} pixels" if width * height else "an unknown number of pixels"
    raise VideoError(f"{size}; a frame may have 1 to {limits.max_pixels}")
