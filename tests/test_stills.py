"""Pictures as people have them: profiles, transparency, animations, sizes of today's phones."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from cogvideox_jax.data import stills, video
from cogvideox_jax.data.media import Limits

RNG = np.random.default_rng(0)


def read(path: Path, height: int, width: int, num_frames: int = 1, fps: float = 8.0) -> np.ndarray:
  return video.read(path, fps=fps, num_frames=num_frames, height=height, width=width).astype(int)


def swapped_profile() -> bytes:
  """sRGB's profile with the colorants of red and blue exchanged: blue is stored as red."""
  data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
  data = data.replace(b"rXYZ", b"xXYZ").replace(b"bXYZ", b"rXYZ").replace(b"xXYZ", b"bXYZ")
  assert data.count("sRGB".encode("utf-16-be")) >= 1
  return data.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))


# A JPEG holds no transparency.
MODES = [("RGB", ".jpg"), *itertools.product(("RGB", "RGBA"), (".png", ".webp", ".tif", ".avif"))]


@pytest.mark.parametrize(("mode", "suffix"), MODES)
def test_a_profile_says_what_the_numbers_mean(tmp_path, mode, suffix):
  image = Image.new(mode, (32, 32), (200, 60, 30, 255)[: len(mode)])
  settings = {} if suffix in (".png", ".tif") else {"quality": 100}
  image.save(tmp_path / f"a{suffix}", icc_profile=swapped_profile(), **settings)
  shown = read(tmp_path / f"a{suffix}", 32, 32)[0]
  assert np.abs(shown - (30, 60, 200)).max() <= 3


def test_a_profile_that_cannot_be_used_is_ignored(tmp_path):
  grey = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
  for number, profile in enumerate((b"no profile", grey)):
    path = tmp_path / f"{number}.png"
    Image.new("RGB", (32, 32), (200, 60, 30)).save(path, icc_profile=profile)
    assert (read(path, 32, 32) == (200, 60, 30)).all()


@pytest.mark.parametrize("suffix", [".png", ".webp", ".avif", ".tif"])
def test_a_transparent_picture_lies_on_white(tmp_path, suffix):
  pixels = np.zeros((32, 32, 4), np.uint8)
  pixels[:, :16] = (0, 255, 0, 0)  # Hidden green,
  pixels[:, 16:] = (0, 0, 0, 128)  # and half of black.
  settings = {".png": {}, ".tif": {}, ".webp": {"lossless": True}}.get(suffix, {"quality": 100})
  Image.fromarray(pixels).save(tmp_path / f"a{suffix}", **settings)
  shown = read(tmp_path / f"a{suffix}", 32, 32)[0]
  assert np.abs(shown[:, :12] - 255).max() <= 2
  assert np.abs(shown[:, 20:] - 127).max() <= 2


def test_a_transparent_colour_of_a_palette_lies_on_white(tmp_path):
  image = Image.fromarray(np.arange(32, dtype=np.uint8)[None].repeat(32, 0) // 16, mode="P")
  image.putpalette([0, 255, 0, 10, 20, 30])
  image.save(tmp_path / "a.png", transparency=0)
  shown = read(tmp_path / "a.png", 32, 32)[0]
  assert (shown[:, :16] == 255).all() and (shown[:, 16:] == (10, 20, 30)).all()


@pytest.mark.parametrize("suffix", [".png", ".webp", ".gif", ".avif"])
def test_an_animation_is_a_video_with_its_own_times(tmp_path, suffix):
  levels, lasting = [0, 60, 120, 180, 240], [100, 200, 100, 300, 100]
  frames = [Image.new("RGB", (48, 32), (level,) * 3) for level in levels]
  settings = {"lossless": True} if suffix == ".webp" else {}
  if suffix == ".avif":
    settings = {"quality": 100}
  frames[0].save(
    tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], duration=lasting, **settings
  )
  info = video.probe(tmp_path / f"a{suffix}")
  assert (info.num_frames, info.height, info.width) == (5, 32, 48)
  assert info.seconds == pytest.approx(0.8)
  shown = read(tmp_path / f"a{suffix}", 32, 48, info.frames_at(10.0), 10.0).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(shown, [0, 60, 60, 120, 180, 180, 180, 240], atol=2)


def test_an_animation_with_limits(tmp_path):
  frames = [Image.new("L", (32, 32), level) for level in range(30)]
  frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], duration=100)
  for limits, reason in ((Limits(max_frames=20), "20 frames"), (Limits(max_seconds=2.0), "3 sec")):
    with pytest.raises(video.VideoError, match=reason):
      video.probe(tmp_path / "a.png", limits)


def test_a_large_photograph_is_decoded_at_a_part_of_its_size(tmp_path, monkeypatch):
  """With its orientation and what its whole shows."""
  small = RNG.integers(60, 200, (12, 16, 3)).astype(np.uint8)
  upright = Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC)
  exif = Image.Exif()
  exif[0x0112] = 6
  turned = upright.transpose(Image.Transpose.ROTATE_90)
  sizes, loaded = [], Image.Image.transpose
  monkeypatch.setattr(
    Image.Image, "transpose", lambda image, how: sizes.append(image.size) or loaded(image, how)
  )
  for suffix in (".jpg", ".png"):
    path = tmp_path / f"a{suffix}"
    turned.save(path, exif=exif, **({"quality": 100} if suffix == ".jpg" else {}))
    whole = read(path, 60, 80)
    assert sizes.pop() == (480, 640)
    monkeypatch.setattr(stills, "WHOLE_PIXELS", 1000)
    assert video.probe(path)[:3] == (1, 480, 640)
    sizes.clear()
    assert np.abs(read(path, 60, 80) - whole).max() <= 4
    assert sizes.pop() == (60, 80)
    monkeypatch.setattr(stills, "WHOLE_PIXELS", 10**6)


def test_a_panorama_is_fit_by_its_crop(tmp_path, monkeypatch):
  monkeypatch.setattr(stills, "WHOLE_PIXELS", 1000)
  pixels = np.zeros((64, 1024, 3), np.uint8)
  pixels[:, 480:544] = 255
  Image.fromarray(pixels).save(tmp_path / "a.png")
  assert read(tmp_path / "a.png", 32, 32).min() >= 254


@pytest.mark.parametrize(("suffix", "size"), [(".tif", (20, 30)), (".bmp", (20, 30))])
def test_other_formats_are_read(tmp_path, suffix, size):
  pixels = RNG.integers(0, 255, (*size, 3)).astype(np.uint8)
  Image.fromarray(pixels).save(tmp_path / f"a{suffix}")
  np.testing.assert_array_equal(read(tmp_path / f"a{suffix}", *size)[0], pixels)


def test_several_pictures_of_one_file_are_no_video(tmp_path):
  """As phones store a photograph with its depth."""
  images = [Image.new("RGB", (32, 32), (level,) * 3) for level in (50, 200)]
  images[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=images[1:])
  assert video.probe(tmp_path / "a.jpg").num_frames == 1
  assert np.abs(read(tmp_path / "a.jpg", 32, 32) - 50).max() <= 2
