"""Decodes VP9 by libvpx, which finds nearly all damage; FFmpeg's own decoder finds none.

Both give the same pixels. libvpx also decodes the transparency of WebM, which FFmpeg's leaves out.
"""

import re
from typing import BinaryIO

from av.codec.codec import UnknownCodecError
from av.codec.context import CodecContext
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

_8_BITS = ("yuv420p", "yuv422p", "yuv440p", "yuv444p")  # Its usual build has no others.
# Matroska's ProjectionPoseRoll, by which a file is turned: FFmpeg tells its own decoder alone.
_TURNED = re.compile(rb"\x76\x75[\x84\x88]")
_HEADER = 2**16  # Bytes that are searched for it.


def decoder(
  file: BinaryIO, container: InputContainer, stream: VideoStream, max_pixels: int
) -> VideoCodecContext | None:
  """Returns the decoder of a stream of VP9; None if FFmpeg's own is to be used.

  file: what the container reads; its position is kept.
  """
  known = stream.codec_context
  if known.name != "vp9" or known.pix_fmt not in _8_BITS or "webm" not in container.format.name:
    return None
  position = file.tell()
  file.seek(0)
  turned = _TURNED.search(file.read(_HEADER))
  file.seek(position)
  if turned:
    return None
  try:
    found = CodecContext.create("libvpx-vp9", "r")
  except UnknownCodecError:  # A build of FFmpeg without it.
    return None
  assert isinstance(found, VideoCodecContext)
  found.thread_count = 1
  found.options = {"max_pixels": str(max_pixels)}
  found.color_primaries, found.color_trc = known.color_primaries, known.color_trc
  return found
