"""Broken and harmful files: each is refused with a line, in little time and memory."""

import os
import struct
import subprocess
import sys
import time
import zlib
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from etils import epath
from PIL import Image
from waiting import PATIENCE

from cogvideox_jax.data import video, vp9
from cogvideox_jax.data.media import Limits
from cogvideox_jax.data.mp4 import write_mp4

CLIPS = Path(__file__).parent / "data" / "clips"
# Runs in a process of its own, since the memory of this one holds JAX; prints megabytes.
PEAK = """
import resource, sys
from cogvideox_jax.data import video, vp9

def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak()
try:
  print(video.probe(sys.argv[1]))
  video.read(sys.argv[1], fps=8.0, num_frames=9, height=64, width=64)
except video.VideoError as error:
  print(error)
print(peak() - before)
"""


X264 = {"preset": "ultrafast", "threads": "1"}


def use(path: os.PathLike) -> None:
  video.probe(path)
  video.read(path, fps=8.0, num_frames=1, height=32, width=32)


def encode(
  path: Path,
  codec: str,
  size: tuple[int, int],
  num_frames: int,
  *,
  stream_options=X264,
  **options,
) -> Path:
  """Writes black frames of (height, width)."""
  height, width = size
  with av.open(str(path), "w", options=options) as container:
    stream = container.add_stream(codec, rate=24)
    stream.height, stream.width = size
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    if codec == "libx264":
      stream.options = stream_options
    black = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), format="rgb24")
    picture = black.reformat(format=stream.pix_fmt)
    for index in range(num_frames):
      picture.pts, picture.time_base = index, Fraction(1, 24)
      container.mux(stream.encode(picture))
    container.mux(stream.encode())
  return path


def sound_only(path: Path) -> None:
  with av.open(str(path), "w") as container:
    stream = container.add_stream("aac", rate=16_000, layout="mono")
    silence = np.zeros((1, 16_000), np.float32)
    sound = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
    sound.sample_rate = 16_000
    container.mux(stream.encode(sound))
    container.mux(stream.encode())


def cut_off(path: Path, *, within_a_frame: bool) -> None:
  """An index that comes first promises frames that are not there."""
  encode(path, "libx264", (64, 64), 24, movflags="faststart")
  with av.open(str(path)) as container:
    packets = [packet for packet in container.demux(video=0) if packet.size]
    end = sorted(packet.pos + packet.size for packet in packets)[11]
  path.write_bytes(path.read_bytes()[: end - 5 if within_a_frame else end])


def vast_png(path: Path) -> None:
  """A header of 50,000 x 50,000 pixels, and next to no data."""

  def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  header = struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0)
  body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
  path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def playlist(path: Path) -> None:
  """Asks FFmpeg to open another file."""
  path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{CLIPS / 'v1.m4v'}\n")


def half(name: str):
  data = (CLIPS / name).read_bytes()
  return lambda path: path.write_bytes(data[: len(data) // 2])


HOSTILE = {
  "absent.mp4": (lambda path: None, "absent"),
  "folder.mp4": (Path.mkdir, "not a regular file"),
  "pipe.mp4": (os.mkfifo, "not a regular file"),
  "empty.mp4": (Path.touch, "0 bytes"),
  "empty.jpg": (Path.touch, "0 bytes"),
  "text.mp4": (lambda path: path.write_text("This is no video.\n" * 50), "cannot be decoded"),
  "text.jpg": (lambda path: path.write_text("This is no image.\n" * 50), "not a JPEG"),
  "photo.mp4": (lambda path: path.write_bytes((CLIPS / "lion.jpg").read_bytes()), "cannot be"),
  "video.jpg": (lambda path: path.write_bytes((CLIPS / "v1.m4v").read_bytes()), "not a JPEG"),
  "half.jpg": (half("lion.jpg"), "cannot be decoded"),
  "half.mp4": (half("v1.m4v"), "cannot be decoded"),
  "cut.mp4": (partial(cut_off, within_a_frame=False), "cut short: 12 of 24 frames"),
  "torn.mp4": (partial(cut_off, within_a_frame=True), "damaged at packet 12"),
  "sound.mp4": (sound_only, "holds no video"),
  "vast.avi": (lambda path: encode(path, "mjpeg", (6144, 6144), 1), "unknown number of pixels"),
  "vast.mp4": (lambda path: encode(path, "libx264", (6144, 6144), 1), "6144x6144 pixels"),
  "vast.png": (vast_png, "50000x50000 pixels|exceeds limit"),
  "list.mp4": (playlist, "cannot be decoded"),
  "concat.mp4": (
    lambda path: path.write_text(f"ffconcat version 1.0\nfile '{CLIPS / 'v1.m4v'}'\n"),
    "cannot be decoded",
  ),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_a_line(tmp_path, name):
  make, reason = HOSTILE[name]
  path = epath.Path(tmp_path / name)  # What a manifest's item holds.
  make(tmp_path / name)
  start = time.process_time()
  for attempt in (video.probe, use):
    with pytest.raises(video.VideoError, match=reason) as caught:
      attempt(path)
    assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)
  assert time.process_time() - start < 5


@pytest.mark.parametrize(
  ("limits", "reason"),
  [
    (Limits(max_bytes=100), "bytes; a file may have 1 to 100"),
    (Limits(max_pixels=320 * 180 - 1), "320x180 pixels"),
    (Limits(max_frames=60), "more than 60 frames"),
    (Limits(max_seconds=4.0), "5 seconds; a video may have 4"),
    (Limits(max_fps=12.0), "more than 12 frames a second"),
  ],
)
def test_each_limit_refuses(limits, reason):
  with pytest.raises(video.VideoError, match=reason):
    video.probe(CLIPS / "v1.m4v", limits)


def test_reading_stops_at_a_limit_that_no_header_shows():
  """What `probe` would refuse is refused by `read` too, before it is decoded."""
  with pytest.raises(video.VideoError, match="more than 30 frames"):
    limits = Limits(max_frames=30)
    video.read(CLIPS / "v1.m4v", fps=8.0, num_frames=33, height=32, width=32, limits=limits)


def test_thousands_of_frames_are_read_only_as_far_as_wanted(tmp_path):
  path = encode(tmp_path / "a.mp4", "libx264", (64, 64), 21_000)
  assert path.stat().st_size < 1_000_000
  start = time.process_time()
  with pytest.raises(video.VideoError, match="more than 20000 frames"):
    video.probe(path, Limits(max_frames=20_000))
  assert video.probe(path).num_frames == 21_000
  assert len(video.read(path, fps=8.0, num_frames=49, height=64, width=64)) == 49
  assert time.process_time() - start < 5


@pytest.mark.parametrize(
  ("codec", "size", "num_frames"),
  [("libx264", (720, 1280), 300), ("mjpeg", (8192, 8192), 1)],  # 830 MB and 201 MB as RGB.
)
def test_memory_stays_bounded(tmp_path, codec, size, num_frames):
  path = encode(tmp_path / "a.mov", codec, size, num_frames)
  command = [sys.executable, "-c", PEAK, str(path)]
  run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
  assert float(run.stdout.splitlines()[-1]) < 150, run.stdout


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL speaks of damaged EXIF data.
@pytest.mark.parametrize("name", ["v1.m4v", "lion.jpg", "a.mp4", "a.webp", "a.png", "a.mkv"])
def test_a_damaged_file_gives_frames_or_a_reason(tmp_path, name):
  """Nothing else, whatever bytes change."""
  rng = np.random.default_rng(0)
  frames = rng.integers(0, 255, (9, 48, 64, 3), np.uint8)
  if name == "a.mp4":
    write_mp4(tmp_path / name, frames, 8.0)
  elif name == "a.mkv":
    encode(tmp_path / name, "libx264", (48, 64), 9)
  elif name.startswith("a."):
    Image.fromarray(frames[0]).save(tmp_path / name)
  else:
    (tmp_path / name).write_bytes((CLIPS / name).read_bytes())
  sound = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
  reasons = 0
  for _ in range(25):
    damaged = sound.copy()
    where = rng.integers(0, len(sound), rng.choice([1, 4, 64])) // rng.choice([1, 20])
    damaged[where] = rng.integers(0, 256, len(where))
    path = tmp_path / f"damaged{Path(name).suffix}"
    path.write_bytes(damaged[: rng.choice([len(sound), len(sound), len(sound) * 3 // 4])].tobytes())
    try:
      use(path)
    except video.VideoError as error:
      reasons += 1
      assert "\n" not in str(error) and str(tmp_path) not in str(error)
  assert reasons > 0


def test_damage_within_frames_of_hevc_is_found(tmp_path):
  """Without a word its decoder would leave out frames, or show what it made up."""
  rng = np.random.default_rng(0)
  frames = np.kron(rng.integers(0, 255, (8, 6, 8, 3)), np.ones((1, 16, 16, 1))).astype(np.uint8)
  options = {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:hash=1:frame-threads=1"}
  with av.open(str(tmp_path / "a.mp4"), "w") as container:
    stream = container.add_stream("libx265", rate=8, options=options)
    stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
    for index, frame in enumerate(frames):
      picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
      picture.pts, picture.time_base = index, Fraction(1, 8)
      container.mux(stream.encode(picture))
    container.mux(stream.encode())

  def read(path: Path) -> np.ndarray:
    return video.read(path, fps=8.0, num_frames=8, height=96, width=128)

  sound, data = read(tmp_path / "a.mp4"), (tmp_path / "a.mp4").read_bytes()
  with av.open(str(tmp_path / "a.mp4")) as container:
    packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
  found = 0
  for position, size in packets:
    damaged = bytearray(data)
    damaged[position + size * 2 // 3] ^= 0x55
    (tmp_path / "b.mp4").write_bytes(damaged)
    try:
      np.testing.assert_array_equal(read(tmp_path / "b.mp4"), sound)
    except video.VideoError:
      found += 1
  assert found >= len(packets) - 1


@pytest.mark.parametrize("pixels", ["yuv420p", "yuva420p"])
def test_damage_within_frames_of_vp9_is_found(tmp_path, monkeypatch, pixels):
  rng = np.random.default_rng(0)
  frames = np.kron(rng.integers(0, 255, (8, 6, 8, 4)), np.ones((1, 16, 16, 1))).astype(np.uint8)
  options = {"deadline": "realtime", "cpu-used": "8", "crf": "30", "b": "0"}
  with av.open(str(tmp_path / "a.webm"), "w") as container:
    stream = container.add_stream("libvpx-vp9", rate=8, options=options)
    stream.height, stream.width, stream.pix_fmt = 96, 128, pixels
    for index, frame in enumerate(frames):
      picture = av.VideoFrame.from_ndarray(frame, format="rgba").reformat(format=pixels)
      picture.pts, picture.time_base = index, Fraction(1, 8)
      container.mux(stream.encode(picture))
    container.mux(stream.encode())

  def read(path: Path) -> np.ndarray:
    return video.read(path, fps=8.0, num_frames=8, height=96, width=128)

  sound, data = read(tmp_path / "a.webm"), (tmp_path / "a.webm").read_bytes()
  with av.open(str(tmp_path / "a.webm")) as container:
    packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
  with monkeypatch.context() as patch:
    patch.setattr(vp9, "decoder", lambda *_: None)
    own = read(tmp_path / "a.webm")  # As FFmpeg's decoder shows it, which knows no transparency.
  assert (sound == own).all() == (pixels == "yuv420p")
  found = 0
  for position, size in packets:
    damaged = bytearray(data)
    damaged[position + 8 + size // 2] ^= 0x55
    (tmp_path / "b.webm").write_bytes(damaged)
    try:
      np.testing.assert_array_equal(read(tmp_path / "b.webm"), sound)
    except video.VideoError:
      found += 1
  assert found == len(packets)
