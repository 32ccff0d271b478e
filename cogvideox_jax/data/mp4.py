"""Writes frames as H.264 in mp4 files, with metadata."""

import itertools
import json
import os
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from jaxtyping import UInt8

from cogvideox_jax.data.colours import EXACT
from cogvideox_jax.data.files import copy_whole
from cogvideox_jax.data.media import DEFAULT_LIMITS, open_video

# Plain colours survive at this crf. There is one thread, no creation time, no B-frame and no
# macroblock tree (mbtree), so that equal frames give equal files: with B-frames libx264's bytes
# differ from run to run, and with the tree in one of about 1,500 files on a loaded machine
# (measured).
_X264 = {
  "crf": "12",
  "preset": "medium",
  "threads": "1",
  "bf": "0",
  "mbtree": "0",
  "flags": "+bitexact",
}

SPOOLED = 2**26  # Bytes of a file that stay in memory until it is whole; more go to the disk.


def write_mp4(
  path: str | os.PathLike[str],
  frames: Iterable[UInt8[np.ndarray, "H W 3"]],
  fps: float,
  metadata: dict[str, Any] | None = None,
) -> None:
  """Writes RGB frames as H.264 (yuv420p, BT.709); one frame is a video too.

  The same arguments give the same bytes. The file appears whole or not at all. However many frames
  there are, only one is in memory, besides at most SPOOLED bytes of the file.

  Args:
    frames: an array [F, H, W, 3], or frames one by one.
    fps: above 0.
    metadata: JSON values, stored in the file's comment; `read_metadata` returns them.

  Raises:
    ValueError: there is no frame, or height or width is odd, which yuv420p cannot hold.
  """
  frames = iter(frames)
  if (first := next(frames, None)) is None:
    raise ValueError("an mp4 takes one frame or more")
  height, width, _ = first.shape
  if not first.size or height % 2 or width % 2:
    raise ValueError(f"an mp4 takes frames of even height and width, not {height}x{width}")
  options = {"movflags": "use_metadata_tags", "fflags": "+bitexact"}
  with tempfile.SpooledTemporaryFile(SPOOLED) as buffer:
    with av.open(buffer, "w", format="mp4", options=options) as container:
      if metadata is not None:
        container.metadata["comment"] = json.dumps(metadata, sort_keys=True)
      rate = Fraction(fps).limit_denominator(1001)
      stream = container.add_stream("libx264", rate=rate, options=_X264)
      stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
      context = stream.codec_context
      context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
      context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
      for index, frame in enumerate(itertools.chain([first], frames)):
        picture = _as_yuv(frame)
        picture.pts, picture.time_base = index, 1 / rate
        container.mux(stream.encode(picture))
      container.mux(stream.encode())
    copy_whole(path, buffer)


def _as_yuv(frame: UInt8[np.ndarray, "H W 3"]) -> av.VideoFrame:
  picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
  return picture.reformat(
    format="yuv420p",
    dst_colorspace=Colorspace.ITU709,
    dst_color_range=ColorRange.MPEG,
    interpolation=EXACT,
    threads=1,
  )


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns the metadata that `write_mp4` stored; empty if the file has none.

  Raises VideoError if the file cannot be used.
  """
  with open_video(path, DEFAULT_LIMITS) as film:
    comment = film.container.metadata.get("comment", "")
  try:
    metadata = json.loads(comment)
  except json.JSONDecodeError:
    return {}
  return metadata if isinstance(metadata, dict) else {}
