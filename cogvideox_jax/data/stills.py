"""Reads pictures, and animations in picture formats, with Pillow."""

import io
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

from cogvideox_jax.data import colours
from cogvideox_jax.data.colours import opaque
from cogvideox_jax.data.media import Limits, check_size, opened
from cogvideox_jax.data.upright import WHOLE_PIXELS, Picture, reduction

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP")
_ANIMATED = (
  "PNG",
  "WEBP",
  "AVIF",
)  # A JPEG or TIFF may hold several pictures, but they are others.
_SHORTEST, _USUAL = 0.011, 0.1  # Seconds: browsers show a frame of less than the first as long.
_ORIENTATION = 0x0112  # The EXIF tag.
_CODED_WITHIN = 2**16  # Bytes at the start of a file in which its colours are named.
_CODING = "coding"  # The key of a picture's `info` under which its `_Coding` is kept.


class _Coding(NamedTuple):
  """The colours that a file names by the numbers of ITU-T H.273; 2 is: it names none."""

  primaries: int = 2
  transfer: int = 2


@contextmanager
def open_picture(path: str | os.PathLike[str], limits: Limits) -> Iterator[Image.Image]:
  """Opens a picture; decodes nothing. Any fault while it is open becomes a VideoError."""
  with opened(path, limits) as file:
    coded = _coding(file)
    with Image.open(file, formats=_FORMATS) as image:
      check_size(image.width, image.height, limits.max_picture_pixels)
      image.info[_CODING] = coded
      yield image


def transfer_of(image: Image.Image) -> str:
  """Returns SDR, HLG or PQ: what a picture of `open_picture` is tagged as."""
  return colours.transfer_named(image.info[_CODING].transfer)


def shown_size(image: Image.Image) -> tuple[int, int]:
  """Returns (width, height) once the picture is upright; for a TIFF Pillow says so itself."""
  turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
  return (image.height, image.width) if turned else image.size


def load(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> Picture:
  """Decodes a picture as upright RGB in sRGB.

  Args:
    sizes: the (height, width) that the picture is to cover; a large one may be reduced to them. A
      JPEG then is decoded at a half, a quarter or an eighth of its size.
  """
  shown, profile = shown_size(image), image.info.get("icc_profile")
  large = image.width * image.height > WHOLE_PIXELS
  part = reduction(shown, sizes) if large else 1.0
  if part < 1:
    image.draft(None, (round(image.width * part), round(image.height * part)))
  plain = _plain(image)
  if (factor := int(max(plain.size) / (part * max(shown)))) > 1:
    plain = plain.reduce(factor)
  coding = image.info.get(_CODING, _Coding())
  return Picture(_to_rgb(ImageOps.exif_transpose(plain), profile, coding), shown)


def is_animation(image: Image.Image) -> bool:
  """Returns whether a picture moves."""
  return image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1


def animation(
  image: Image.Image, sizes: Sequence[tuple[int, int]]
) -> Iterator[tuple[float, float, Picture]]:
  """Yields each frame of an animation: when it is shown, for how many seconds, and the frame."""
  time = 0.0
  for number in range(bool(image.info.get("default_image")), getattr(image, "n_frames", 1)):
    image.seek(number)
    picture = load(image, sizes)
    seconds = image.info.get("duration", 0) / 1000
    seconds = seconds if seconds >= _SHORTEST else _USUAL
    yield time, seconds, picture
    time += seconds


def _plain(image: Image.Image) -> Image.Image:
  """Returns a picture as one of the modes RGBA, RGB, L and CMYK."""
  if image.mode.startswith("I;16"):  # PIL would make every value above 255 white.
    grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    grey.info = image.info
    return grey
  if image.has_transparency_data:
    return image if image.mode == "RGBA" else image.convert("RGBA")
  return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _to_rgb(image: Image.Image, profile: bytes | None, coding: _Coding) -> Image.Image:
  """Converts to RGB, from the colours of a profile or a coding, laid on colours.BACKGROUND.

  Of both, an HDR coding holds, as in browsers; else the profile.
  """
  is_hdr = colours.transfer_named(coding.transfer) != colours.SDR
  if profile and not is_hdr:
    image = _to_srgb(image, profile)
  plain = opaque(image) if image.mode == "RGBA" else image.convert("RGB")
  if is_hdr or (not profile and colours.is_wide(coding.primaries)):
    return Image.fromarray(colours.to_srgb_of_8_bits(np.asarray(plain), *coding))
  return plain


def _coding(file: BinaryIO) -> _Coding:
  """Returns what an AVIF or PNG says of its colours by numbers. Leaves the file at its start."""
  start = file.read(_CODED_WITHIN)
  file.seek(0)
  if (at := start.find(b"colrnclx")) >= 0 and start[4:8] == b"ftyp":
    numbers = start[at + 8 : at + 12].ljust(4, b"\0")
    return _Coding(*struct.unpack(">HH", numbers))
  if (at := start.find(b"cICP")) >= 0 and start.startswith(b"\x89PNG"):
    return _Coding(*start[at + 4 : at + 6].ljust(2, b"\0"))
  return _Coding()


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
  """Converts from an ICC profile's colours; one that does not fit the picture is ignored.

  Browsers ignore it, too.
  """
  try:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if "sRGB" in ImageCms.getProfileDescription(source):
      return image
    return (
      ImageCms.profileToProfile(
        image,
        source,
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGBA" if image.mode == "RGBA" else "RGB",
      )
      or image
    )
  except (ImageCms.PyCMSError, OSError):
    return image
