"""Colours of files are those that their makers saw: HDR, wide gamuts, untagged and transparent."""

import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from cogvideox_jax.data import colours, video

SDR = np.random.default_rng(0).integers(0, 230, (6, 8, 3)).repeat(8, 0).repeat(8, 1)
RED, GREEN, BLUE, WHITE = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), (0.3127, 0.3290))
GAMUTS = {
  "bt709": (RED, GREEN, BLUE),
  "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
  "p3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}


def to_xyz(gamut: str) -> np.ndarray:
  """Linear RGB -> XYZ, from the chromaticities."""

  def xyz(x: float, y: float) -> np.ndarray:
    return np.array([x / y, 1, (1 - x - y) / y])

  primaries = np.stack([xyz(*primary) for primary in GAMUTS[gamut]], axis=1)
  return primaries * np.linalg.solve(primaries, xyz(*WHITE))


def light(srgb: np.ndarray) -> np.ndarray:
  signal = srgb / 255
  return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def hlg(nits: np.ndarray) -> np.ndarray:
  """BT.2100: the signal of light on a display of 1000 cd/m², a gamma on each channel."""
  scene = (nits / 1000) ** (1 / 1.2)
  high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
  return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


def pq(nits: np.ndarray) -> np.ndarray:
  """SMPTE ST 2084."""
  power = (nits / 10_000) ** 0.1593017578125
  return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def write(path: Path, signal: np.ndarray, *, pixels="yuv444p12le", matrix=9, **tags) -> None:
  """Writes a lossless frame of an RGB signal in [0, 1]; the tags are FFmpeg's numbers."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("ffv1", rate=8, options={"strict": "experimental"})
    stream.height, stream.width, stream.pix_fmt = *signal.shape[:2], pixels
    for name, value in {"colorspace": matrix, "color_range": 1, **tags}.items():
      setattr(stream.codec_context, name, value)
    frame = av.VideoFrame.from_ndarray(np.uint16(signal * 65535 + 0.5), format="rgb48le")
    frame = frame.reformat(
      format=pixels,
      dst_colorspace=Colorspace.BT2020 if matrix == 9 else Colorspace.ITU709,
      dst_color_range=ColorRange.MPEG,
    )
    frame.pts, frame.time_base = 0, Fraction(1, 8)
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def read(path: Path, shape: tuple[int, ...]) -> np.ndarray:
  return video.read(path, fps=8.0, num_frames=1, height=shape[0], width=shape[1])[0].astype(int)


def as_hdr(srgb: np.ndarray, transfer, white: float = 203.0) -> np.ndarray:
  wide = light(srgb) @ to_xyz("bt709").T @ np.linalg.inv(to_xyz("bt2020")).T
  return transfer(np.clip(wide, 0, None) * white)


@pytest.mark.parametrize(("transfer", "tag"), [(hlg, 18), (pq, 16)])
def test_hdr_of_an_sdr_picture_is_that_picture(tmp_path, transfer, tag):
  path = tmp_path / "a.mkv"
  write(path, as_hdr(SDR, transfer), color_trc=tag, color_primaries=9)
  assert np.abs(read(path, SDR.shape) - SDR).max() <= 3
  assert video.probe(path).transfer == transfer.__name__


@pytest.mark.parametrize(("transfer", "tag"), [(hlg, 18), (pq, 16)])
def test_highlights_of_hdr_keep_their_order_and_white_is_almost_white(tmp_path, transfer, tag):
  nits = np.array([100.0, 203.0, 400.0, 1000.0]).repeat(8)[None, :, None]
  signal = np.broadcast_to(transfer(nits), (16, 32, 3))
  write(tmp_path / "a.mkv", signal, color_trc=tag, color_primaries=9)
  shown = read(tmp_path / "a.mkv", (16, 32))[8, 4::8, 0]
  assert shown[1] >= 247 and shown[-1] == 255
  assert (np.diff(shown) > 0).all()


@pytest.mark.parametrize(("gamut", "tag"), [("p3", 12), ("bt2020", 9)])
def test_a_wide_gamut_becomes_that_of_srgb(tmp_path, gamut, tag):
  wide = light(SDR) @ to_xyz("bt709").T @ np.linalg.inv(to_xyz(gamut)).T
  signal = np.where(wide <= 0.0031308, 12.92 * wide, 1.055 * wide ** (1 / 2.4) - 0.055)
  write(tmp_path / "a.mkv", signal, matrix=1, color_primaries=tag, color_trc=1)
  assert np.abs(read(tmp_path / "a.mkv", SDR.shape) - SDR).max() <= 3


def test_a_large_hdr_frame_is_reduced_to_what_its_whole_shows(tmp_path):
  smooth = np.linspace(20, 220, 640)[None, :, None] * np.linspace(0.3, 1, 360)[:, None, None]
  srgb = np.broadcast_to(smooth, (360, 640, 3))
  write(tmp_path / "a.mkv", as_hdr(srgb, hlg), color_trc=18, color_primaries=9)
  whole = read(tmp_path / "a.mkv", (360, 640)).reshape(36, 10, 64, 10, 3).mean(axis=(1, 3))
  assert np.abs(read(tmp_path / "a.mkv", (36, 64)) - whole).max() <= 2


@pytest.mark.parametrize(
  ("size", "matrix"),
  [((544, 1280), 709), ((720, 720), 709), ((640, 360), 709), ((576, 720), 601), ((480, 854), 601)],
)
def test_an_untagged_file_has_the_matrix_of_its_size(tmp_path, size, matrix):
  """As players choose it: both the height and the width count."""
  colour = np.array([200, 60, 30])
  with av.open(str(tmp_path / "a.avi"), "w") as container:
    stream = container.add_stream("mpeg4", rate=8, options={"qscale": "1", "flags": "+qscale"})
    (stream.height, stream.width), stream.pix_fmt = size, "yuv420p"
    picture = np.broadcast_to(colour.astype(np.uint8), (*size, 3))
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(
      format="yuv420p",
      dst_colorspace=Colorspace.ITU709 if matrix == 709 else Colorspace.ITU601,
      dst_color_range=ColorRange.MPEG,
    )
    frame.pts, frame.time_base = 0, Fraction(1, 8)
    container.mux(stream.encode(frame))
    container.mux(stream.encode())
  assert np.abs(read(tmp_path / "a.avi", (32, 32)) - colour).max() <= 5


def test_a_transparent_video_lies_on_white(tmp_path):
  pixels = np.zeros((32, 32, 4), np.uint8)
  pixels[:, :16] = (0, 255, 0, 0)  # Hidden green,
  pixels[:, 16:] = (0, 0, 0, 128)  # and half of black.
  with av.open(str(tmp_path / "a.mov"), "w") as container:
    stream = container.add_stream("png", rate=8)
    stream.height, stream.width, stream.pix_fmt = 32, 32, "rgba"
    frame = av.VideoFrame.from_ndarray(pixels, format="rgba")
    frame.pts, frame.time_base = 0, Fraction(1, 8)
    container.mux(stream.encode(frame))
    container.mux(stream.encode())
  shown = read(tmp_path / "a.mov", (32, 32))
  assert (shown[:, :16] == 255).all() and (shown[:, 16:] == 127).all()


def test_colours_that_no_rule_converts_are_refused_by_name(tmp_path):
  write(tmp_path / "a.mkv", SDR / 255, color_trc=16, color_primaries=9)
  for number, reason in ((14, "ICtCp"), (15, "Dolby Vision profile 5")):
    path = tmp_path / f"{number}.mkv"
    data = (tmp_path / "a.mkv").read_bytes()
    assert data.count(b"\x55\xb1\x81\x09") == 1  # Matroska's MatrixCoefficients.
    path.write_bytes(data.replace(b"\x55\xb1\x81\x09", b"\x55\xb1\x81" + bytes([number])))
    for use in (video.probe, lambda path: read(path, (32, 32))):
      with pytest.raises(video.VideoError, match=reason):
        use(path)


def hdr_avif(path, level, transfer, primaries=9):
  """An AVIF of one grey, coded with 10 bits as phones and cameras do."""
  with av.open(str(path), "w", format="avif") as container:
    stream = container.add_stream(
      "libsvtav1", rate=1, options={"crf": "1", "svtav1-params": "lp=1"}
    )
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p10le"
    context = stream.codec_context
    context.color_trc, context.color_primaries, context.colorspace = transfer, primaries, 9
    grey = np.full((64, 64, 3), level, np.uint8)
    frame = av.VideoFrame.from_ndarray(grey, format="rgb24").reformat(format="yuv420p10le")
    frame.color_trc, frame.color_primaries, frame.colorspace = transfer, primaries, 9
    frame.pts = 0
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


@pytest.mark.parametrize(("transfer", "name"), [(16, "pq"), (18, "hlg")])
def test_a_picture_of_hdr_gets_the_curve_of_video(tmp_path, transfer, name):
  changed = []
  for level in (40, 148, 230):
    hdr_avif(tmp_path / "a.avif", level, transfer)
    assert video.probe(tmp_path / "a.avif").transfer == name
    shown = video.read(tmp_path / "a.avif", fps=1.0, num_frames=1, height=64, width=64)[0]
    with av.open(str(tmp_path / "a.avif")) as container:
      expected = colours.rgb(next(container.decode(video=0)))
    assert np.abs(shown.astype(int) - expected).max() <= 3
    changed.append(np.abs(shown.astype(int) - level).max())
  assert max(changed) > 10


def test_a_png_that_is_tagged_as_hdr_gets_the_curve_too(tmp_path):
  level = round(255 * float(pq(np.array(50.0))))  # 50 cd/m², where 203 are white.
  Image.new("RGB", (32, 32), (level,) * 3).save(tmp_path / "a.png")
  data = (tmp_path / "a.png").read_bytes()
  body = b"cICP" + bytes([9, 16, 0, 1])
  chunk = struct.pack(">I", 4) + body + struct.pack(">I", zlib.crc32(body))
  (tmp_path / "b.png").write_bytes(data[:33] + chunk + data[33:])
  untagged, tagged = (
    video.read(tmp_path / name, fps=1.0, num_frames=1, height=32, width=32)
    for name in ("a.png", "b.png")
  )
  assert (untagged == level).all()
  expected = 255 * (1.055 * (50 / 203) ** (1 / 2.4) - 0.055)
  assert np.abs(tagged.astype(int) - expected).max() <= 3
  assert video.probe(tmp_path / "b.png").transfer == "pq"
