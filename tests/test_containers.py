"""What containers say about frames: edit lists, repeated frames, display matrices, many tracks."""

import itertools
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from test_video import grey_steps, indices

from cogvideox_jax.data import video


def write(
  path: Path,
  frames: np.ndarray,
  times: Sequence[int] | None = None,
  *,
  codec: str = "libx264",
  rate: int = 24,
  matrix: Sequence[int] | None = None,
  **options: str,
) -> None:
  """Writes frames that are shown at times, counted in frames of the rate."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=rate, options=options)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    if matrix:
      stream.set_display_matrix(matrix)
    encode(container, stream, frames, times or range(len(frames)), rate)


def encode(container, stream, frames: np.ndarray, times: Sequence[int], rate: int) -> None:
  stream.codec_context.time_base = Fraction(1, rate)
  for frame, time in zip(frames, times, strict=True):
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    picture.pts, picture.time_base = time, Fraction(1, rate)
    container.mux(stream.encode(picture))
  container.mux(stream.encode())


def shown(path: Path, fps: float = 24.0) -> list[int]:
  """The indices of all frames that the measure of a file promises."""
  count = video.probe(path).frames_at(fps)
  return indices(video.read(path, fps=fps, num_frames=count, height=32, width=48))


@pytest.mark.parametrize(("first", "last"), [(0, 20), (25, 48), (13, 31)])
def test_an_edit_list_that_trims_is_no_damage(tmp_path, first, last):
  """As phones and lossless cutters trim: whole groups of pictures stay in the file, unshown."""
  path = tmp_path / "a.mp4"
  write(path, grey_steps(48), crf="4", bf="2", g="8")
  data = bytearray(path.read_bytes())
  at = data.index(b"elst") + 12
  _, media_time = struct.unpack_from(">ii", data, at)
  timescale = 12288  # Of a track of 24 frames a second.
  assert struct.pack(">I", timescale) in data
  trimmed = (last - first) * 1000 // 24, media_time + first * timescale // 24
  struct.pack_into(">ii", data, at, *trimmed)
  path.write_bytes(data)
  assert shown(path) == list(range(first, last))


@pytest.mark.parametrize(
  ("codec", "options"),
  [("mpeg4", {}), ("mpeg4", {"bf": "2"}), ("mjpeg", {}), ("libx264", {"bf": "0", "crf": "4"})],
)
@pytest.mark.parametrize("times", [[0], [0, 1, 2, 3, 7, 8, 9, 14], [0, 1, 5, 6, 7, 20, 21]])
def test_frames_of_an_avi_may_be_repeated(tmp_path, codec, options, times):
  """A repeated frame has an empty chunk, or none, but the header counts it."""
  path = tmp_path / "a.avi"
  qscale = {} if codec == "libx264" else {"flags": "+qscale", "global_quality": "118"}
  write(path, grey_steps(len(times)), times, codec=codec, **qscale, **options)
  expected = [sum(time <= now for time in times) - 1 for now in range(times[-1] + 1)]
  if "bf" in options and options["bf"] != "0":
    # The file does not say when they are shown, only their order.
    assert list(dict.fromkeys(shown(path))) == list(range(len(times)))
  else:
    assert shown(path) == expected


def test_frames_of_an_avi_come_in_their_order(tmp_path):
  """It has the times of decoding only, where B-frames come late."""
  write(tmp_path / "a.avi", grey_steps(40), codec="libx264", bf="2", crf="4")
  assert shown(tmp_path / "a.avi") == list(range(40))


def test_an_avi_that_is_cut_off_between_frames_is_cut_short(tmp_path):
  path = tmp_path / "a.avi"
  write(path, grey_steps(40), codec="libx264", bf="2", crf="4")
  with av.open(str(path)) as container:
    packets = [packet for packet in container.demux(video=0) if packet.size]
    end = packets[20].pos
  path.write_bytes(path.read_bytes()[:end])
  with pytest.raises(video.VideoError, match="cut short: 20 of 40 frames"):
    video.probe(path)


@pytest.mark.parametrize("turn", [*itertools.product([-1, 1], [-1, 1], [False, True])])
def test_a_display_matrix_turns_and_mirrors(tmp_path, turn):
  """The pixel of column x and row y is shown at x (a, b) + y (c, d)."""
  across, down, swapped = turn
  (a, b), (c, d) = ((0, down), (across, 0)) if swapped else ((across, 0), (0, down))
  stored = np.zeros((32, 48, 3), np.uint8)
  stored[:16, :24], stored[:16, 24:], stored[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
  y, x = np.mgrid[:32, :48]
  places = x * a + y * c, x * b + y * d
  places = [place - place.min() for place in places]
  expected = np.zeros((places[1].max() + 1, places[0].max() + 1, 3), int)
  expected[places[1], places[0]] = stored
  unit = 65536
  matrix = [a * unit, b * unit, 0, c * unit, d * unit, 0, 0, 0, 2**30]
  write(tmp_path / "a.mp4", stored[None], crf="1", matrix=matrix)
  height, width = expected.shape[:2]
  assert video.probe(tmp_path / "a.mp4")[1:3] == (height, width)
  frame = video.read(tmp_path / "a.mp4", fps=8.0, num_frames=1, height=height, width=width)[0]
  errors = np.abs(frame - expected).reshape(2, height // 2, 2, width // 2, 3)
  assert errors[:, 4:-4, :, 4:-4].max() <= 12


@pytest.mark.parametrize("film_first", [True, False])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("other", ["thumbnail", "poster", "cover"])
def test_of_several_tracks_the_film_is_taken(tmp_path, film_first, suffix, other):
  path, height, width = tmp_path / f"a{suffix}", *{"poster": (64, 96)}.get(other, (16, 16))
  with av.open(str(path), "w") as container:
    streams = {}
    for name in ("film", other) if film_first else (other, "film"):
      size = (32, 48) if name == "film" else (height, width)
      codec = "mjpeg" if name == "cover" else "libx264"
      streams[name] = stream = container.add_stream(codec, rate=24)
      (stream.height, stream.width) = size
      stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    if other == "cover":
      streams["cover"].disposition = av.stream.Disposition.attached_pic
    count = 30 if other == "thumbnail" else 1
    encode(
      container, streams[other], np.zeros((count, height, width, 3), np.uint8), range(count), 24
    )
    encode(container, streams["film"], grey_steps(30), range(30), 24)
  info = video.probe(path)
  assert info[:3] == (30, 32, 48)
  if other == "poster" or (other == "thumbnail" and suffix == ".mkv"):
    assert info.note == f"of 2 video tracks, number {2 - film_first} is used: 48x32 pixels"
  assert len(shown(path)) == 30


def test_slow_motion_of_240_frames_a_second_passes(tmp_path):
  with av.open(str(tmp_path / "a.mp4"), "w") as container:
    stream = container.add_stream("libx264", rate=Fraction(240_024, 1000))
    stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
    for index, frame in enumerate(grey_steps(50)):
      picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
      picture.pts, picture.time_base = index, Fraction(1000, 240_024)
      container.mux(stream.encode(picture))
    container.mux(stream.encode())
  info = video.probe(tmp_path / "a.mp4")
  assert info.fps == pytest.approx(240.024, abs=0.01)
  read = video.read(tmp_path / "a.mp4", fps=30.0, num_frames=6, height=32, width=48)
  assert indices(read) == [0, 8, 16, 24, 32, 40]


@pytest.mark.parametrize(
  ("seconds", "reason"), [(100_000, "a video may have 86400"), (3600, "9 frames in 3600 seconds")]
)
def test_a_frame_that_is_shown_for_hours_gives_no_thousand_clips(tmp_path, seconds, reason):
  write(tmp_path / "a.mkv", grey_steps(9), [*range(8), 24 * seconds], crf="20")
  with pytest.raises(video.VideoError, match=reason):
    video.probe(tmp_path / "a.mkv")
