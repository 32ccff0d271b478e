"""Turns decoded frames as their display matrix says, and fits pictures to a size."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream
from jaxtyping import UInt8
from PIL import Image

from cogvideox_jax.data import colours

# Larger frames are reduced while their colours are converted, so that they take little memory.
WHOLE_PIXELS = 8_900_000


class Picture(NamedTuple):
  """An upright picture."""

  image: Image.Image  # RGB.
  # (width, height) as shown. Not that of the image if pixels are not square, or if it was reduced.
  shown: tuple[int, int]


class Screen(NamedTuple):
  """How a stream's frames are brought to a screen."""

  aspect: float  # How much wider than high a pixel is.
  swapped: bool  # Whether rows and columns are swapped,
  across: bool  # then left and right,
  down: bool  # then top and bottom.


def screen_of(frame: av.VideoFrame, stream: VideoStream) -> Screen:
  """Reads the pixels' shape and the display matrix (ISO 14496-12, 6.2.2) of a stream's frame.

  The matrix may turn by any angle: the nearest quarter is taken.
  """
  aspect = float(stream.sample_aspect_ratio or 1)
  # PyAV's side data keep their frame alive until the next garbage collection: ask a small one.
  small = frame.reformat(16, 16, "gray", interpolation=Interpolation.POINT, threads=1)
  side_data: Any = small.side_data  # PyAV's types know motion vectors alone.
  matrix = side_data.get(Type.DISPLAYMATRIX)
  if matrix is None:
    return Screen(aspect, swapped=False, across=False, down=False)
  # Column x of the frame adds (a, b) to the place on the screen, row y adds (c, d).
  a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
  if abs(b) + abs(c) > abs(a) + abs(d):
    return Screen(aspect, swapped=True, across=c < 0, down=b < 0)
  return Screen(aspect, swapped=False, across=a < 0, down=d < 0)


def shown_size(frame: av.VideoFrame, screen: Screen) -> tuple[int, int]:
  """Returns the (width, height) of a frame on a screen: upright, with square pixels."""
  width = max(1, round(frame.width * screen.aspect))
  return (frame.height, width) if screen.swapped else (width, frame.height)


def upright(frame: av.VideoFrame, screen: Screen, sizes: Sequence[tuple[int, int]]) -> Picture:
  """Converts a frame to RGB and turns it upright.

  Args:
    sizes: the (height, width) that the picture is to cover; a large one may be reduced to them.
  """
  shown, reduced = shown_size(frame, screen), None
  if colours.is_costly(frame) or frame.width * frame.height > WHOLE_PIXELS:
    part = reduction(shown, sizes)
    # Scaling would mix the two fields of an interlaced frame.
    down = 1.0 if frame.interlaced_frame else part
    reduced = max(1, round(frame.height * down)), max(1, round(frame.width * part))
  pixels = colours.rgb(frame, reduced)
  if frame.interlaced_frame and frame.height > 1:
    pixels = pixels[::2]  # Keep one field, because the other shows another instant.
  pixels = pixels.transpose(1, 0, 2) if screen.swapped else pixels
  pixels = pixels[:: -1 if screen.down else 1, :: -1 if screen.across else 1]
  return Picture(Image.fromarray(np.ascontiguousarray(pixels)), shown)


def reduction(shown: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> float:
  """Returns the scale, at most 1, at which a picture of (width, height) still covers all sizes."""
  width, height = shown
  return min(1.0, max(max(down / height, across / width) for down, across in sizes))


def fit(picture: Picture, height: int, width: int) -> UInt8[np.ndarray, "H W 3"]:
  """Scales a picture to cover a size and crops it at the centre.

  Only the crop is scaled, so a long thin image costs no more than any other.
  """
  image, (shown_width, shown_height) = picture
  crop_width = min(shown_width, shown_height * width / height)
  crop_height = min(shown_height, shown_width * height / width)
  across = image.width * (1 - crop_width / shown_width) / 2
  down = image.height * (1 - crop_height / shown_height) / 2
  box = (across, down, image.width - across, image.height - down)
  return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=3.0))
