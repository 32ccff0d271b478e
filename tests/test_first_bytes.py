"""A file that no decoder takes is refused by what it is."""

from pathlib import Path

import av
import numpy as np
import pytest
from etils import epath
from PIL import Image

from cogvideox_jax.data import video
from cogvideox_jax.data.clip_folder import read_folder


def stream(path: Path, container: str, codec: str) -> None:
  with av.open(str(path), "w", format=container) as file:
    out = file.add_stream(codec, rate=8)
    out.width, out.height, out.pix_fmt = 32, 32, "yuv420p"
    for number in range(3):
      frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
      frame.pts = number
      file.mux(out.encode(frame.reformat(format="yuv420p")))
    file.mux(out.encode())


def picture(path: Path, kind: str) -> None:
  Image.new("RGB", (32, 32), (9, 8, 7)).save(path, format=kind)


HEIC_START = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)


@pytest.mark.parametrize(
  ("name", "make", "reason"),
  [
    ("a.mp4", lambda path: stream(path, "ivf", "libvpx"), "an IVF stream"),
    ("a.avi", lambda path: stream(path, "yuv4mpegpipe", "wrapped_avframe"), "YUV4MPEG2"),
    ("a.mkv", lambda path: stream(path, "nut", "libx264"), "a NUT container"),
    ("a.mov", lambda path: stream(path, "swf", "flv"), "Flash"),
    (
      "a.mp4",
      lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
      "git lfs",
    ),
    (
      "a.jpg",
      lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
      "git lfs",
    ),
    ("a.webm", lambda path: path.write_text("<!DOCTYPE html><html>404</html>"), "a web page"),
    ("a.mp4", lambda path: path.write_text('{"error": "expired"}'), "JSON, maybe the message"),
    ("a.png", lambda path: path.write_text('{"error": "expired"}'), "JSON, maybe the message"),
    ("a.mp4", lambda path: path.write_text("#EXTM3U\n"), "a playlist"),
    ("a.mp4", lambda path: picture(path, "JPEG"), "a picture: give it"),
    ("a.mp4", lambda path: picture(path, "WEBP"), "suffix .webp"),
    ("a.mp4", lambda path: picture(path, "AVIF"), "suffix .avif"),
    ("a.mp4", lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "an archive: unpack"),
    ("a.mp4", lambda path: path.write_bytes(bytes(4096)), "its first bytes are zeros"),
    ("a.jpg", lambda path: path.write_bytes(bytes(4096)), "its first bytes are zeros"),
    ("a.mp4", lambda path: path.write_bytes(b"ID3\x04" + bytes(99)), "sound alone"),
    ("a.jpg", lambda path: stream(path, "mp4", "libx264"), "but a video: give it the suffix"),
    ("a.heic", lambda path: path.write_bytes(HEIC_START), "HEIC, which is not read: convert"),
    ("a.jpg", lambda path: path.write_bytes(HEIC_START), "HEIC, which is not read: convert"),
    ("a.png", lambda path: path.write_bytes(b"\0\0\0\x0cJXL \r\n" + bytes(99)), "JPEG XL"),
  ],
)
def test_the_reason_says_what_the_file_is_and_the_way_out(tmp_path, name, make, reason):
  make(tmp_path / name)
  for use in (
    video.probe,
    lambda path: video.read(path, fps=8.0, num_frames=1, height=32, width=32),
  ):
    with pytest.raises(video.VideoError, match=reason) as told:
      use(tmp_path / name)
    assert "\n" not in str(told.value) and str(tmp_path) not in str(told.value)


def test_damage_is_not_taken_for_another_suffix(tmp_path):
  stream(tmp_path / "a.mp4", "mp4", "libx264")
  data = (tmp_path / "a.mp4").read_bytes()
  (tmp_path / "a.mp4").write_bytes(data[: len(data) // 3])
  with pytest.raises(video.VideoError, match=r"^cannot be decoded: [^;]*$"):
    video.probe(tmp_path / "a.mp4")


def test_heic_photos_of_a_folder_are_counted_with_the_way_out(tmp_path):
  for number in range(3):
    (tmp_path / f"{number}.HEIC").write_bytes(HEIC_START)
  picture(tmp_path / "a.jpg", "JPEG")
  (tmp_path / "a.txt").write_text("a colour")
  _, _, notes = read_folder(epath.Path(tmp_path), subfolders=True, allow_links=False)
  assert notes[0].endswith("3 .heic.") and "convert it to JPEG" in notes[1]
