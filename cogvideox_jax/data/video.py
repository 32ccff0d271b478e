"""Video files to frames and back.

Decode workers import this file alone, so it needs numpy, PyAV and PIL only.
"""

import io
import json
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from jaxtyping import UInt8


# Plain colours survive at this crf; one thread and no creation time, so that equal frames give
# equal files.
_X264 = {"crf": "12", "preset": "medium", "threads": "1", "flags": "+bitexact"}
_SWS = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


def write_mp4(
  path: str | os.PathLike[str],
  frames: UInt8[np.ndarray, "F H W 3"],
  fps: float,
  metadata: dict | None = None,
) -> None:
  """Writes RGB frames as H.264 (yuv420p, BT.709), one frame being a video too.

  fps: above 0. metadata: JSON values, kept in the file's comment; `read_metadata` returns it.
  The same arguments give the same bytes, and an existing file is replaced whole.
  Raises ValueError for no frames, or an odd height or width, which yuv420p cannot hold.
  """
  num_frames, height, width, _ = frames.shape
  if num_frames == 0 or height % 2 or width % 2 or not height * width:
    raise ValueError(
      f"an mp4 needs frames of even height and width, not {num_frames} x {height}x{width}"
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
        interpolation=_SWS,
        threads=1,
      )
      picture.pts, picture.time_base = index, 1 / rate
      container.mux(stream.encode(picture))
    container.mux(stream.encode())
  target = path if hasattr(path, "write_bytes") else Path(path)
  target.write_bytes(buffer.getvalue())
