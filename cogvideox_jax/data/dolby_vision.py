"""Finds the Dolby Vision profile that a file is tagged with, which FFmpeg does not show to PyAV.

Profile 5 has colours of its own (IPT), which only Dolby's decoders turn into a picture. The others
have a picture for every player: HDR10, HLG or SDR.
"""

import io
from collections.abc import Iterator, Sequence
from typing import BinaryIO

_STSD = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")
_RECORDS = (b"dvcC", b"dvvC")  # The configuration record; the second is of profiles above 7.
_HEAD = 2**18  # Bytes of a Matroska file, or of a sample description, in which a record is sought.


def profile(file: BinaryIO) -> int | None:
  """Returns the profile; None if the file is tagged with none. Leaves the file at its start."""
  size, start = file.seek(0, io.SEEK_END), file.seek(0)
  head = file.read(_HEAD)
  found = None
  if head.startswith(b"\x1a\x45\xdf\xa3"):  # Matroska: BlockAddIDType, then its extra data.
    # Extra data have a size of one byte, and begin as the record does.
    found = _record(head, [b"\x41\xe7\x84" + name for name in _RECORDS], b"\x41\xed", 1)
  elif head[4:8] == b"ftyp":
    for begin, end in _boxes(file, _STSD, start, size):
      file.seek(begin)
      found = found or _record(file.read(min(end - begin, _HEAD)), _RECORDS, b"", 0)
  file.seek(0)
  return found


def _record(data: bytes, names: Sequence[bytes], then: bytes, skipped: int) -> int | None:
  """Returns the profile of the record that follows a name, then other bytes."""
  for name in names:
    if (at := data.find(name)) >= 0 and (at := data.find(then, at + len(name))) >= 0:
      version_and_profile = data[at + len(then) + skipped :][:3]
      return version_and_profile[2] >> 1 if len(version_and_profile) == 3 else None
  return None


def _boxes(
  file: BinaryIO, path: Sequence[bytes], begin: int, end: int
) -> Iterator[tuple[int, int]]:
  """Yields the (begin, end) of the contents of all boxes of a path (ISO 14496-12, 4.2)."""
  while begin + 8 <= end:
    file.seek(begin)
    header = file.read(16)
    size, kind, contents = int.from_bytes(header[:4], "big"), header[4:8], begin + 8
    if size == 1:
      size, contents = int.from_bytes(header[8:16], "big"), begin + 16
    stop = begin + size if size else end
    if not contents <= stop <= end:
      return  # Damaged; FFmpeg says so.
    if kind == path[0]:
      if path[1:]:
        yield from _boxes(file, path[1:], contents, stop)
      else:
        yield contents, stop
    begin = stop
