"""Says what a file is that no decoder takes, by its first bytes, so that its refusal has a reason.

It is asked after decoding has failed: the name decides how a file is read, the bytes say why not.
"""

import re

HEIC = "HEIC, which is not read: convert it to JPEG (heif-convert, ImageMagick, the phone's export)"
HEIC_SUFFIXES = (".heic", ".heif", ".hif")
AVIF = "an AVIF picture: give it the suffix .avif"
VIDEO = "a video: give it the suffix of one, if it is whole"
_WAY_OUT = "convert it with FFmpeg, to .mp4 or .mkv"
# Patterns of the first bytes -> what the file is, and the way out.
_KINDS: tuple[tuple[bytes, str], ...] = (
  (rb"version https://git-lfs", "a pointer of Git LFS, not the file: run `git lfs pull`"),
  (rb"\s*(<!doctype html|<html|<\?xml|<svg)", "a web page or XML, maybe of a failed download"),
  (rb"\s*[\[{]\s*\"", "JSON, maybe the message of a failed download"),
  (rb"#EXTM3U|ffconcat|<MPD|\[playlist\]", "a playlist, which names other files: give those"),
  (rb"\xff\xd8\xff|\x89PNG|BM....\0\0\0\0|II\*\0|MM\0\*", "a picture: give it the suffix of one"),
  (rb"RIFF....WEBP", "a WebP picture: give it the suffix .webp"),
  (rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)", HEIC),
  (rb"....ftypavi[fs]", AVIF),
  (rb"....ftypcrx |II\x1a\0\0\0HEAPCCDR|FUJIFILMCCD-RAW|IIRO|IIRS", "a camera's raw picture"),
  (rb"gimp xcf|8BPS", "a file of an image editor: export it as PNG"),
  (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL, which is not read: convert it to PNG"),
  (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000, which is not read: convert it to PNG"),
  (rb"....(ftyp|moov|mdat|wide)|RIFF....AVI |\x1a\x45\xdf\xa3", VIDEO),
  (rb"DKIF", f"an IVF stream, which is not read: {_WAY_OUT}"),
  (rb"YUV4MPEG2", f"raw video (YUV4MPEG2), which is not read: {_WAY_OUT}"),
  (rb"\.RMF", f"RealMedia, which is not read: {_WAY_OUT}"),
  (rb"[FCZ]WS", f"Flash, which is not read: {_WAY_OUT}"),
  (rb"nut/multimedia", f"a NUT container, which is not read: {_WAY_OUT}"),
  (rb"\0\0\0\x01[\x67\x40]|\0\0\x01[\x67\x40]", f"a bare stream of H.264 or HEVC: {_WAY_OUT}"),
  (rb"ID3|\xff[\xfb\xf3\xf2]|fLaC|RIFF....WAVE|OggS.{24,32}\x01?(vorbis|Opus)", "sound alone"),
  (
    rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!|\xfd7zXZ|\x28\xb5\x2f\xfd",
    "an archive: unpack it first",
  ),
  (rb"%PDF", "a PDF"),
  (rb"\0{64}", "empty: its first bytes are zeros, as a download or copy leaves that was cut off"),
)
LONGEST = 64  # Bytes that are looked at.


def kind(start: bytes) -> str:
  """Returns what a file is and the way out; empty if its first bytes say nothing."""
  for pattern, meaning in _KINDS:
    if re.match(pattern, start, re.DOTALL | re.IGNORECASE):
      return meaning
  return ""
