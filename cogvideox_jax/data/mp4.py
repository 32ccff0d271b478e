"""Writes frames as H.264 in mp4 files, with metadata."""

import io
import json
import os
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from jaxtyping import UInt8

from cogvideox_jax.data.colours import EXACT
from cogvideox_jax.data.files import write_whole
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


def write_mp4(
  path: str | os.PathLike[str],
  frames: UInt8[np.ndarray, "F H W 3"],
  fps: float,
  metadata: dict[str, Any] | None = None,
) -> None:
  """Writes RGB frames as H.264 (yuv420p, BT.709); one frame is a video too.

  The same arguments give the same bytes. The file appears whole or not at all.

  Args:
    fps: above 0.
    metadata: JSON values, stored in the file's comment; `read_metadata` returns them.

  Raises:
    ValueError: there is no frame, or height or width is odd, which yuv420p cannot hold.
  """
  num_frames, height, width, _ = frames.shape
  if not frames.size or height % 2 or width % 2:
    raise ValueError(
      f"an mp4 takes frames of even height and width, not {num_frames} of {height}x{width}"
    )
  buffer = io.BytesIO()
  options = {"movflags": "use_metadata_tags", "fflags": "+bitexact"}
  with av.open(buffer, "w", format="mp4", options=options) as container:
    if metadata is not None:
      container.metadata["comment"] = json.dumps(metadata, sort_keys=True)
    rate = Fraction(fps).limit_denominator(1001)
    stream = container.add_stream("libx264", rate=rate, options=_X264)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    for index, frame in enumerate(frames):
      picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
      picture = picture.reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=EXACT,
        threads=1,
      )
      picture.pts, picture.time_base = index, 1 / rate
      container.mux(stream.encode(picture))
    container.mux(stream.encode())
  write_whole(path, buffer.getvalue())


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
