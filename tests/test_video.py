"""Video files to frames: each shows its instant, and nothing is stretched or lost."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from cogvideox_jax.data import video
from cogvideox_jax.data.mp4 import write_mp4

CLIPS = Path(__file__).parent / "data" / "clips"


def grey_steps(num_frames: int, height: int = 32, width: int = 48) -> np.ndarray:
  """Frames that say their own index: frame i is grey of level 5 i."""
  levels = 5 * np.arange(num_frames, dtype=np.uint8)
  return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3)).copy()


def indices(frames: np.ndarray) -> list[int]:
  return [round(float(frame.mean()) / 5) for frame in frames]


def write_timed(path: Path, frames: np.ndarray, times: list[Fraction], **stream_settings) -> None:
  """Writes frames that are shown from given seconds on, by another encoder's settings."""
  with av.open(str(path), "w") as container:
    options = stream_settings.pop("options", {"crf": "4", "bf": "2"})
    stream = container.add_stream("libx264", rate=24, options=options)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = Fraction(1, 1000)
    for name, value in stream_settings.items():
      if name == "rotation":
        stream.set_display_rotation(value)
      else:
        setattr(stream.codec_context, name, value)
    for frame, time in zip(frames, times, strict=True):
      picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
      picture.pts, picture.time_base = round(time * 1000), Fraction(1, 1000)
      container.mux(stream.encode(picture))
    container.mux(stream.encode())


def disc(height: int, width: int, radii: tuple[float, float]) -> np.ndarray:
  """A white ellipse of radii (down, across) at the centre of a black frame."""
  down, across = np.mgrid[:height, :width] + 0.5
  inside = ((down - height / 2) / radii[0]) ** 2 + ((across - width / 2) / radii[1]) ** 2 < 1
  return np.repeat(inside[..., None], 3, axis=-1).astype(np.uint8) * 255


def extents(frame: np.ndarray) -> tuple[float, float]:
  """Height and width of the bright area, in pixels, to a part of one."""
  light = frame.mean(axis=-1) / 255
  return float(light.sum(axis=0).max()), float(light.sum(axis=1).max())


def test_an_edge_stays_where_it_was(tmp_path):
  """Frames that have the wanted size are not filtered, shifted or blurred."""
  pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  back = video.read(tmp_path / "a.png", fps=8.0, num_frames=1, height=40, width=56)
  np.testing.assert_array_equal(back[0], pixels)


@pytest.mark.parametrize(
  ("source", "wanted", "expected"),
  [
    (24, 8, [0, 3, 6, 9, 12, 15]),
    (24, 24, list(range(17))),
    (8, 24, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]),
    (30, 8, [0, 3, 7, 11, 15]),
  ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])  # Matroska rounds times to milliseconds.
def test_a_frame_is_the_one_shown_at_its_instant(tmp_path, source, wanted, expected, suffix):
  path = tmp_path / f"a{suffix}"
  write_timed(path, grey_steps(20), [Fraction(i, source) for i in range(20)])
  frames = video.read(path, fps=float(wanted), num_frames=len(expected), height=32, width=48)
  assert indices(frames) == expected


def write_long(path: Path, times: list[Fraction] | None = None) -> None:
  """Writes 160 frames with a keyframe every 12, of 6.7 seconds unless `times` says otherwise."""
  times = times or [Fraction(i, 24) for i in range(160)]
  frames = grey_steps(160) + np.arange(48, dtype=np.uint8)[:, None]
  write_timed(path, frames, times, options={"crf": "4", "bf": "2", "g": "12"})


@pytest.mark.parametrize("late", [0, 5])  # Seconds at which the file's first frame is shown.
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_a_window_far_into_a_file_shows_what_a_whole_decoding_shows(tmp_path, suffix, late):
  rng = np.random.default_rng(0)
  gaps = [Fraction(int(gap), 1000) for gap in rng.integers(10, 70, size=160)]
  varied = [late + sum(gaps[:i], Fraction(0)) for i in range(160)]
  for name, times in (("steady", [late + Fraction(i, 24) for i in range(160)]), ("varied", varied)):
    path = tmp_path / f"{name}{suffix}"
    write_long(path, times)
    for fps in (8.0, 30.0):
      count = video.probe(path).frames_at(fps)
      whole = video.read(path, fps=fps, num_frames=count, height=32, width=48)
      for start in range(0, count - 3, 7):
        window = video.Window(start, 3, 32, 48)
        shown = [frame for _, frame in video.read_windows(path, [window], fps=fps)]
        np.testing.assert_array_equal(shown, whole[start : start + 3])


@pytest.mark.parametrize("late", [0, 5])
def test_what_comes_long_before_a_window_is_not_decoded(tmp_path, monkeypatch, late):
  write_long(tmp_path / "a.mkv", [late + Fraction(i, 24) for i in range(160)])
  decoded = []
  monkeypatch.setattr(video, "check_size", lambda *size: decoded.append(size))
  list(video.read_windows(tmp_path / "a.mkv", [video.Window(48, 2, 32, 48)], fps=8.0))
  assert len(decoded) < 24  # From the keyframe before 6 s on, and the first; the file has 160.


def test_an_index_that_leads_too_far_changes_no_frame(tmp_path, monkeypatch):
  write_long(tmp_path / "a.mp4")
  window = video.Window(30, 3, 32, 48)
  expected = video.read(tmp_path / "a.mp4", fps=8.0, num_frames=33, height=32, width=48)[30:]
  seek, asked = video._seek, []

  def misled(film, seconds):
    asked.append(seconds)
    return seek(film, seconds + 2 if len(asked) == 1 else seconds)

  monkeypatch.setattr(video, "_seek", misled)
  shown = [frame for _, frame in video.read_windows(tmp_path / "a.mp4", [window], fps=8.0)]
  assert len(asked) == 2
  np.testing.assert_array_equal(shown, expected)


def test_a_variable_rate_goes_by_the_timestamps(tmp_path):
  times = [Fraction(time, 1000) for time in (0, 100, 200, 1000, 1050, 1990)]
  write_timed(tmp_path / "a.mkv", grey_steps(6), times)
  frames = video.read(tmp_path / "a.mkv", fps=4.0, num_frames=8, height=32, width=48)
  assert indices(frames) == [0, 2, 2, 2, 3, 4, 4, 4]


def test_interlaced_frames_show_one_instant(tmp_path):
  """Their even and odd lines are two: a bar that moves would be two bars, each half as bright."""
  frames = np.zeros((9, 64, 96, 3), np.uint8)
  frames[:, ::2, 16:32] = frames[:, 1::2, 64:80] = 255
  options = {"flags": "+ilme+ildct", "crf": "4"}
  write_timed(tmp_path / "a.mkv", frames, [Fraction(i, 8) for i in range(9)], options=options)
  for size in ((64, 96), (32, 48)):
    height, width = size
    shown = video.read(tmp_path / "a.mkv", fps=8.0, num_frames=9, height=height, width=width)
    columns = shown[..., 0].reshape(-1, width).astype(int)
    assert columns[:, width // 4 - 1].min() > 240  # Inside the bar of the even lines,
    assert columns[:, 3 * width // 4].max() < 15  # and of the odd ones.


def test_a_late_start_is_no_gap(tmp_path):
  write_timed(tmp_path / "a.mkv", grey_steps(9), [5 + Fraction(i, 8) for i in range(9)])
  assert video.probe(tmp_path / "a.mkv").frames_at(8.0) == 9
  frames = video.read(tmp_path / "a.mkv", fps=8.0, num_frames=9, height=32, width=48)
  assert indices(frames) == list(range(9))


@pytest.mark.parametrize(
  ("name", "fps"), [("rgb.m4v", 8.0), ("v1.m4v", 3.0), ("v1.m4v", 30.0), ("lion.jpg", 8.0)]
)
def test_a_clip_gives_as_many_frames_as_its_measure_says(name, fps):
  count = video.probe(CLIPS / name).frames_at(fps)
  assert len(video.read(CLIPS / name, fps=fps, num_frames=count, height=16, width=16)) == count
  with pytest.raises(video.VideoError, match="too short"):
    wanted = count + int(fps)
    video.read(CLIPS / name, fps=fps, num_frames=wanted, height=16, width=16)


def test_six_seconds_are_forty_nine_frames():
  """As the published models count: 8n+1. The clip is 6.006 s at 24 fps less a thousandth."""
  assert video.probe(CLIPS / "rgb.m4v").frames_at(8.0) == 49
  assert video.VideoInfo(144, 540, 960, 24.0, 6.0).frames_at(8.0) == 49
  assert video.VideoInfo(48, 540, 960, 8.0, 6.0).frames_at(8.0) == 48


def test_real_files_decode_to_what_they_show():
  info = video.probe(CLIPS / "rgb.m4v")
  assert (info.num_frames, info.height, info.width) == (144, 540, 960)
  frames = video.read(CLIPS / "rgb.m4v", fps=8.0, num_frames=48, height=32, width=48)
  # The cuts are at 2.002 and 4.004 s: frame 16, at 2.000 s, is still red.
  for shown, colour in ((frames[:17], (255, 0, 0)), (frames[17:33], (0, 255, 0))):
    assert np.abs(shown.astype(int) - colour).max() <= 3
  assert np.abs(frames[33:].astype(int) - (0, 0, 255)).max() <= 3
  assert video.probe(CLIPS / "v1.m4v")[:3] == (120, 180, 320)
  lion = video.read(CLIPS / "lion.jpg", fps=8.0, num_frames=1, height=256, width=256)
  reference = np.asarray(Image.open(CLIPS / "lion.jpg"))
  np.testing.assert_array_equal(lion[0], reference)


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (48, 96), (200, 300), (360, 200)])
@pytest.mark.parametrize("source", [(120, 200), (200, 120), (160, 160)])
def test_a_circle_stays_a_circle(tmp_path, source, size):
  write_mp4(tmp_path / "a.mp4", disc(*source, (20, 20))[None], 8.0)
  height, width = size
  frame = video.read(tmp_path / "a.mp4", fps=8.0, num_frames=1, height=height, width=width)[0]
  scale = max(height / source[0], width / source[1])
  down, across = extents(frame)
  assert down == pytest.approx(40 * scale, abs=0.5)
  assert across == pytest.approx(40 * scale, abs=0.5)
  light = frame.mean(axis=-1)
  centre = [float((index * light).sum() / light.sum()) for index in np.indices(light.shape)]
  assert centre == pytest.approx([(height - 1) / 2, (width - 1) / 2], abs=0.1)


def test_pixels_that_are_not_square_are_shown_as_meant(tmp_path):
  """Pixels of 2:1: an ellipse in the file is a circle on the screen."""
  settings = {"sample_aspect_ratio": Fraction(2, 1)}
  write_timed(tmp_path / "a.mp4", disc(120, 80, (30, 15))[None], [Fraction(0)], **settings)
  assert video.probe(tmp_path / "a.mp4")[:3] == (1, 120, 160)
  frame = video.read(tmp_path / "a.mp4", fps=8.0, num_frames=1, height=60, width=80)[0]
  assert extents(frame) == pytest.approx((30, 30), abs=0.5)


def test_a_fine_pattern_shrinks_to_grey(tmp_path):
  """Without a filter, every 8th pixel of a pattern of 2 would be black, or white."""
  pattern = np.indices((256, 256)).sum(axis=0) % 2 * 255
  Image.fromarray(np.repeat(pattern[..., None], 3, axis=-1).astype(np.uint8)).save(
    tmp_path / "a.png"
  )
  frame = video.read(tmp_path / "a.png", fps=8.0, num_frames=1, height=32, width=32)[0]
  assert np.abs(frame.astype(int) - 128).max() <= 2


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_turned_recording_is_upright(tmp_path, quarters):
  """A phone stores the sensor's frame and how to turn it: here, anticlockwise."""
  upright = np.zeros((64, 96, 3), np.uint8)
  upright[:32, :48] = (255, 0, 0)
  upright[32:, 48:] = (0, 0, 255)
  stored = np.ascontiguousarray(np.rot90(upright, -quarters))[None]
  write_timed(tmp_path / "a.mp4", stored, [Fraction(0)], rotation=90 * quarters)
  assert video.probe(tmp_path / "a.mp4")[:3] == (1, 64, 96)
  frame = video.read(tmp_path / "a.mp4", fps=8.0, num_frames=1, height=64, width=96)[0]
  assert np.abs(frame[4:28, 4:44].astype(int) - (255, 0, 0)).max() <= 10
  assert np.abs(frame[36:60, 52:92].astype(int) - (0, 0, 255)).max() <= 10
  assert frame[4:28, 52:92].max() <= 10


def test_a_turned_photograph_is_upright(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # Orientation: turn by 90 degrees clockwise to show.
  upright = np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)
  Image.fromarray(np.rot90(upright)).save(tmp_path / "a.png", exif=exif)
  assert video.probe(tmp_path / "a.png")[:3] == (1, 24, 40)
  frame = video.read(tmp_path / "a.png", fps=8.0, num_frames=1, height=24, width=40)[0]
  np.testing.assert_array_equal(frame, upright)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_an_image_of_any_mode_is_rgb(tmp_path, mode):
  path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
  image = Image.new("RGB", (32, 32), (90, 90, 90))
  (image.quantize(8) if mode == "P" else image.convert(mode)).save(path)
  frame = video.read(path, fps=8.0, num_frames=1, height=32, width=32)[0]
  assert np.abs(frame.astype(int) - 90).max() <= 2


def test_an_image_of_sixteen_bits_keeps_its_greys(tmp_path):
  levels = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
  Image.fromarray(levels).save(tmp_path / "a.png")
  frame = video.read(tmp_path / "a.png", fps=8.0, num_frames=1, height=32, width=32)[0]
  np.testing.assert_allclose(frame[..., 0], levels / 257, atol=1)
