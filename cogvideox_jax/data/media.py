"""Opens video and image files that may be hostile.

Each is opened with limits, by one decoder thread, never through another file or the network; and
whatever is wrong with a file is a `VideoError`.
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

# Containers only: playlists (hls, concat, dash) would open further files.
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"
# What PyAV and PIL raise at a damaged file, found by feeding them such files.
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
  """Why a file cannot be used, in one line without the file's name. Goes to quarantine.jsonl."""


@dataclass(frozen=True)
class Limits:
  """What a file may ask of us before it is refused."""

  max_pixels: int = 8_900_000  # A frame; 4K footage passes.
  max_frames: int = 20_000  # In the file.
  max_bytes: int = 2 * 1024**3  # Of the file.
  max_seconds: float = 600.0
  max_fps: float = 240.0  # Of the file, on average; more is a way to keep a decoder busy.


DEFAULT_LIMITS = Limits()


def is_image(path: str | os.PathLike[str]) -> bool:
  return os.fspath(path).lower().endswith(IMAGE_SUFFIXES)


def as_path(path: str | os.PathLike[str]) -> Any:
  """A pathlib.Path for a string; another stays, as an etils.epath.Path may name a bucket."""
  return Path(path) if isinstance(path, str) else path


def not_a_file(path: str | os.PathLike[str]) -> str:
  """Why a path is no file to read; empty if it is one. To ask before opening: a pipe would wait."""
  place = as_path(path)
  if not place.exists():
    return "the file is absent"
  special = os.path.exists(path) and not os.path.isfile(path)  # epath takes a pipe for a file.
  return "not a regular file" if special or not place.is_file() else ""


@contextmanager
def _opened(path: str | os.PathLike[str], limits: Limits) -> Iterator[BinaryIO]:
  """Opens a file within the limits; any fault met while it is open becomes a VideoError."""
  try:
    if reason := not_a_file(path):
      raise VideoError(reason)
    with as_path(path).open("rb") as file:
      size = file.seek(0, io.SEEK_END)
      if not 0 < size <= limits.max_bytes:
        raise VideoError(f"{size} bytes; a file may have 1 to {limits.max_bytes}")
      file.seek(0)
      yield file
  except UnidentifiedImageError as error:  # Its own message names the file.
    raise VideoError("not a JPEG, PNG or WebP image") from error
  except _FAULTS as error:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    raise VideoError(f"cannot be decoded: {reason or type(error).__name__}") from error


def load_image(path: str | os.PathLike[str], limits: Limits) -> Image.Image:
  """Decodes an image: upright, RGB. Of an animation, the first frame."""
  with _opened(path, limits) as file, Image.open(file, formats=("JPEG", "PNG", "WEBP")) as image:
    check_size(image.width, image.height, limits)
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # PIL would take every value above 255 for white.
      upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    return upright.convert("RGB")


@contextmanager
def open_video(
  path: str | os.PathLike[str], limits: Limits
) -> Iterator[tuple[InputContainer, VideoStream]]:
  """Opens the first video stream of a file, with one decoder thread."""
  options = {
    "max_pixels": str(limits.max_pixels),  # Opening alone may allocate frames.
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
  if not 0 < width * height <= limits.max_pixels:
    # FFmpeg shows no size where its decoder alone, stopped by the limit, would know it.
    size = f"{width}x{height} pixels" if width * height else "an unknown number of pixels"
    raise VideoError(f"{size}; a frame may have 1 to {limits.max_pixels}")
