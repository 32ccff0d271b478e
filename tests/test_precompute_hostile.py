"""A job over odd and hostile files of many kinds: each is shown right, or refused with a reason."""

import itertools
import json
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from small_encodings import make_encoders
from test_hostile_video import HOSTILE, encode
from typed_config import typed

from cogvideox_jax.data.decoding import Decoders, File
from cogvideox_jax.data.mp4 import write_mp4
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.video import Window
from cogvideox_jax.precompute import encode_clips
from configs import tiny

# What every odd file shows: a colour in each quarter, so that turns and mirrors are seen.
QUARTERS = np.zeros((64, 96, 3), np.uint8)
QUARTERS[:32, :48], QUARTERS[:32, 48:], QUARTERS[32:, 48:] = (
  (200, 40, 40),
  (40, 180, 60),
  (40, 70, 220),
)
ALPHA = np.where(np.arange(96) % 2, 255, 128)[None, :, None].repeat(64, 0)
ON_WHITE = (QUARTERS * (ALPHA / 255) + (255 - ALPHA)).round()


# Well inside the quarters, whose colours run into one another at their borders.
HALVES = (slice(4, 28), slice(36, 60)), (slice(4, 44), slice(52, 92))


def write(path: Path, codec: str, pixels: str, picture=QUARTERS, **settings) -> None:
  """A picture at eight frames a second, or at `times` in seconds. settings: of the stream."""
  times = settings.pop("times", None)
  unit = Fraction(1, 1000) if times else Fraction(1, 8)  # Some encoders want that of the rate.
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=8)
    stream.height, stream.width = picture.shape[:2]
    stream.pix_fmt = pixels
    stream.options = settings.pop("options", {})
    stream.codec_context.time_base = unit
    if rotation := settings.pop("rotation", 0):
      stream.set_display_rotation(rotation)
    for name, value in settings.items():
      setattr(stream.codec_context, name, value)
    for time in times or [index * unit for index in range(9)]:
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
      frame = frame.reformat(format=pixels)
      frame.pts, frame.time_base = round(time / unit), unit
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


def video_of(codec: str, pixels: str, **settings):
  return lambda path: write(path, codec, pixels, **settings)


def turned(degrees: int):
  """As a phone records it."""
  picture = np.rot90(QUARTERS, -degrees // 90)
  return video_of("libx264", "yuv444p", picture=picture, rotation=degrees)


def image_of(mode: str, **settings):
  return lambda path: Image.fromarray(QUARTERS).convert(mode).save(path, **settings)


def see_through(path: Path) -> None:
  """A colour stands behind full and half transparency alike."""
  Image.fromarray(np.concatenate([QUARTERS, ALPHA], -1).astype(np.uint8)).save(path)


def turned_image(path: Path) -> None:
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(np.rot90(QUARTERS)).save(path, exif=exif, quality=95, subsampling=0)


def animation(path: Path) -> None:
  others = [Image.new("RGB", (96, 64), "white")] * 3
  Image.fromarray(QUARTERS).save(path, save_all=True, append_images=others, lossless=True)


def with_sound(path: Path) -> None:
  with av.open(str(path), "w") as container:
    sound = container.add_stream("aac", rate=16_000, layout="mono")
    picture = container.add_stream("libx264", rate=8)
    picture.height, picture.width, picture.pix_fmt = 64, 96, "yuv444p"
    for index in range(9):
      frame = av.VideoFrame.from_ndarray(QUARTERS, format="rgb24").reformat(format="yuv444p")
      frame.pts, frame.time_base = index, Fraction(1, 8)
      container.mux(picture.encode(frame))
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 20_000), np.float32), "fltp", "mono")
    silence.sample_rate = 16_000
    container.mux([*sound.encode(silence), *sound.encode(), *picture.encode()])


UNEVEN = [Fraction(time, 1000) for time in (0, 40, 80, 700, 710, 720, 1000)]
INTERLACED = {"flags": "+ilme+ildct"}
SHOWN = {  # How far each colour may be off.
  "turned90.mp4": (turned(90), 4),
  "turned180.mp4": (turned(180), 4),
  "turned270.mov": (turned(270), 4),
  "uneven.mkv": (video_of("libx264", "yuv444p", times=UNEVEN), 4),
  "late.mkv": (video_of("libx264", "yuv444p", times=[3 + Fraction(i, 8) for i in range(9)]), 4),
  "interlaced.mkv": (video_of("mpeg2video", "yuv420p", options=INTERLACED), 4),
  "interlaced.mp4": (video_of("libx264", "yuv420p", options=INTERLACED), 4),
  "ten_bits.mp4": (video_of("libx264", "yuv420p10le"), 4),
  "ten_bits_hevc.mp4": (
    video_of("libx265", "yuv420p10le", options={"x265-params": "log-level=0"}),
    4,
  ),
  "ten_bits_av1.mp4": (video_of("libsvtav1", "yuv420p10le"), 6),
  "alpha.mov": (video_of("qtrle", "argb"), 4),
  "alpha_ten_bits.mov": (video_of("prores_ks", "yuva444p10le"), 4),
  "alpha.webm": (video_of("libvpx-vp9", "yuva420p"), 6),
  "rgb.mp4": (video_of("libx264rgb", "rgb24"), 4),
  "full_range.mp4": (video_of("libx264", "yuvj420p"), 4),
  "old.avi": (video_of("mpeg4", "yuv420p"), 6),
  "palette.gif": (video_of("gif", "rgb8"), 24),  # Three bits of red and green, two of blue.
  "sound_too.mp4": (with_sound, 4),
  "MATROSKA.MP4": (lambda path: write(path, "libx264", "yuv444p"), 4),
  "-dash 100% 'é' 日本\n.mp4": (video_of("libx264", "yuv444p"), 4),
  "alpha.png": (see_through, 1),
  "palette.png": (lambda path: Image.fromarray(QUARTERS).quantize(8).save(path), 2),
  "turned.jpg": (turned_image, 8),
  "cmyk.jpg": (image_of("CMYK", quality=95), 8),
  "animation.webp": (animation, 0),
}


def long_ago(path: Path) -> None:
  """Nine frames, the last of them after eleven days."""
  write(path, "libx264", "yuv420p", times=[*range(8), 1_000_000])


def many_frames(path: Path) -> None:
  encode(path, "libx264", (64, 64), 21_000)


def noise_inside(path: Path) -> None:
  """The container is whole, its pictures are not."""
  frames = np.random.default_rng(0).integers(0, 255, (24, 64, 64, 3), np.uint8)
  write_mp4(path, frames, 8.0)
  data = bytearray(path.read_bytes())
  start = data.index(b"mdat") + 2000
  data[start : start + 40_000] = np.random.default_rng(1).bytes(40_000)
  path.write_bytes(data)


def tiny_video(path: Path) -> None:
  write(path, "libx264", "yuv420p", picture=np.zeros((8, 8, 3), np.uint8))


REFUSED = {
  **HOSTILE,
  "eleven_days.mkv": (long_ago, "seconds; a video may have 600"),
  "many.mp4": (many_frames, "more than 20000 frames"),
  "noise.mp4": (noise_inside, "cannot be decoded|damaged at frame|too short"),
  "small.mp4": (tiny_video, "8x8 .* pixels would be enlarged 2.0 times to 16x16; 1.5 is the most"),
}
LINES = {  # Lines of the manifest that are wrong by themselves.
  b"not JSON": "not JSON",
  b'["sound.mp4", "a list"]': "not a JSON object",
  b'{"file": "alpha.png"}': "no caption",
  b'{"file": "alpha.png", "caption": "\xff\xfe"}': "not UTF-8",
  b'{"file": "alpha.png", "caption": "\\udcff"}': "character",
  b'{"file": "nowhere.mp4", "caption": "x"}': "absent",
  b'{"file": "../outside.png", "caption": "x"}': "outside",
  b'{"file": "link.png", "caption": "x"}': "outside",
  b'{"file": "/etc/passwd", "caption": "x"}': "outside",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("hostile") / "clips"
  folder.mkdir()
  for name, (make, _) in {**SHOWN, **REFUSED}.items():
    make(folder / name)
  Image.fromarray(QUARTERS).save(folder.parent / "outside.png")
  (folder / "link.png").symlink_to(folder.parent / "outside.png")
  names = [*SHOWN, *(name for name in REFUSED if name not in NO_ITEMS)]
  lines = [json.dumps({"file": name, "caption": f"this is {name}"}).encode() for name in names]
  (folder / "manifest.jsonl").write_bytes(b"\n".join([*lines, *LINES]))
  return folder


NO_ITEMS = ("absent.mp4", "folder.mp4", "pipe.mp4")  # read_manifest refuses them: see LINES.


def test_there_are_thirty_kinds_at_least():
  assert len(SHOWN) + len(REFUSED) + len(LINES) >= 30


def test_an_odd_file_is_shown_as_it_is_meant(folder):
  files = [File(folder / name, 8.0, lambda info: [Window(0, 1, 64, 96)]) for name in SHOWN]
  with Decoders(2) as decoders:
    for (name, (_, tolerance)), pieces in zip(SHOWN.items(), decoders.decode(files), strict=True):
      [(_, frames)] = pieces
      for corner in itertools.product(*HALVES):
        whole = ON_WHITE if name == "alpha.png" else QUARTERS
        shown, meant = (picture[corner].astype(int) for picture in (frames[0], whole))
        off = np.abs((shown - meant).mean(axis=(0, 1)))  # Lossy codecs differ in single pixels.
        assert off.max() <= tolerance, (name, corner, off)


def test_a_job_keeps_what_it_can_and_says_why_not_of_the_rest(folder, tmp_path):
  config = tiny.get_config()
  config.model.text_length = 32
  config.stages.tiny.update(sizes=((16, 16), (16, 24)), durations=(1, 9))
  config.data.limits.update(max_frames=20_000, max_seconds=600.0)
  model = make_encoders(tmp_path / "model")
  counts = encode_clips.encode(typed(config), folder, tmp_path / "out", model, workers=2)
  dataset = Dataset(tmp_path / "out" / "tiny")
  assert sorted({dataset.source(clip) for clip in range(len(dataset))}) == sorted(SHOWN)
  assert {clip.caption for clip in map(dataset.__getitem__, range(len(dataset)))} == {
    f"this is {name}" for name in SHOWN
  }
  lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
  refused = [json.loads(line) for line in lines]
  reasons = {line["file"]: line["reason"] for line in refused[: -len(LINES)]}
  assert sorted(reasons) == sorted(name for name in REFUSED if name not in NO_ITEMS)
  for name, reason in reasons.items():
    assert re.search(REFUSED[name][1], reason), (name, reason)
  for line, words in zip(refused[-len(LINES) :], LINES.values(), strict=True):
    assert words in line["reason"], line
  assert counts == (len(SHOWN), len(reasons) + len(LINES))
