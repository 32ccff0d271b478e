"""Dolby Vision is told by its configuration record, which FFmpeg's muxers do not write."""

from pathlib import Path

import numpy as np
import pytest

from cogvideox_jax.data import dolby_vision, video
from cogvideox_jax.data.mp4 import write_mp4


def record(profile: int) -> bytes:
  return bytes([1, 0, profile << 1, 0x35]).ljust(24, b"\0")


def tag(path: Path, profile: int) -> None:
  """Adds a record to an mp4 whose index comes last."""
  data = path.read_bytes()
  box = b"\0\0\0\x20" + (b"dvcC" if profile < 8 else b"dvvC") + record(profile)
  at = data.index(b"avcC") - 4
  data = bytearray(data[:at] + box + data[at:])
  for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
    place = data.index(name) - 4
    size = int.from_bytes(data[place : place + 4], "big") + len(box)
    data[place : place + 4] = size.to_bytes(4, "big")
  path.write_bytes(data)


def test_profile_5_is_refused_by_name_and_others_pass(tmp_path):
  path = tmp_path / "a.mp4"
  for profile in (None, 8, 5):
    write_mp4(path, np.zeros((9, 32, 32, 3), np.uint8), 8.0)
    if profile:
      tag(path, profile)
    with path.open("rb") as file:
      assert dolby_vision.profile(file) == profile
    if profile != 5:
      assert video.probe(path).num_frames == 9
      continue
    for use in (
      video.probe,
      lambda path: video.read(path, fps=8.0, num_frames=1, height=32, width=32),
    ):
      with pytest.raises(video.VideoError, match="Dolby Vision profile 5"):
        use(path)


def test_matroska_maps_the_record_to_additional_blocks(tmp_path):
  mapping = b"\x41\xe7\x84dvcC\x41\xed\x98" + record(5)
  (tmp_path / "a.mkv").write_bytes(b"\x1a\x45\xdf\xa3" + bytes(100) + mapping)
  with (tmp_path / "a.mkv").open("rb") as file:
    assert dolby_vision.profile(file) == 5 and file.tell() == 0


def test_damaged_boxes_are_left_to_ffmpeg(tmp_path):
  write_mp4(tmp_path / "a.mp4", np.zeros((1, 32, 32, 3), np.uint8), 8.0)
  tag(tmp_path / "a.mp4", 5)
  sound = (tmp_path / "a.mp4").read_bytes()
  rng = np.random.default_rng(0)
  for _ in range(300):
    data = bytearray(sound)
    for place in rng.integers(0, len(sound), 20):
      data[place] = rng.integers(256)
    (tmp_path / "damaged.mp4").write_bytes(data[: rng.integers(len(data))])
    with (tmp_path / "damaged.mp4").open("rb") as file:
      assert dolby_vision.profile(file) in (None, *range(128))
