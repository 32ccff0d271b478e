"""Frames to mp4 files: what is written comes back, and equal frames give equal files."""

from pathlib import Path

import numpy as np
import pytest
from test_video import grey_steps

from cogvideox_jax.data import mp4, video

CLIPS = Path(__file__).parent / "data" / "clips"
COLOURS = np.array(
  [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [128, 128, 128], [255, 255, 255]], np.uint8
)


def test_plain_colours_survive_a_file(tmp_path):
  frames = np.broadcast_to(COLOURS[:, None, None], (6, 48, 64, 3))
  mp4.write_mp4(tmp_path / "a.mp4", frames, 8.0)
  back = video.read(tmp_path / "a.mp4", fps=8.0, num_frames=6, height=48, width=64)
  assert np.abs(back.astype(int) - frames).max() <= 3


def test_the_same_frames_give_the_same_bytes(tmp_path):
  frames = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), np.uint8)
  for name in ("a.mp4", "b.mp4"):
    mp4.write_mp4(tmp_path / name, frames, 8.0, {"seed": 1})
  assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
  assert sorted(file.name for file in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_metadata_comes_back(tmp_path):
  metadata = {"prompt": 'a "café" = 1; #2\n\\', "seed": 3, "scale": 6.5, "list": [1, None]}
  mp4.write_mp4(tmp_path / "a.mp4", grey_steps(1), 8.0, metadata)
  mp4.write_mp4(tmp_path / "b.mp4", grey_steps(1), 8.0)
  assert mp4.read_metadata(tmp_path / "a.mp4") == metadata
  assert mp4.read_metadata(tmp_path / "b.mp4") == {}
  assert mp4.read_metadata(CLIPS / "v1.m4v") == {}


@pytest.mark.parametrize(
  ("shape", "words"),
  [((1, 33, 48, 3), "33x48"), ((1, 32, 47, 3), "32x47"), ((0, 32, 48, 3), "one frame or more")],
)
def test_frames_that_h264_cannot_hold_are_named(tmp_path, shape, words):
  with pytest.raises(ValueError, match=words):
    mp4.write_mp4(tmp_path / "a.mp4", np.zeros(shape, np.uint8), 8.0)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [1.0, 8.0, 12.5, 29.97, 30000 / 1001])
def test_a_written_file_measures_as_it_was_written(tmp_path, fps):
  mp4.write_mp4(tmp_path / "a.mp4", grey_steps(17), fps)
  info = video.probe(tmp_path / "a.mp4")
  assert (info.num_frames, info.height, info.width) == (17, 32, 48)
  assert info.fps == pytest.approx(fps, rel=1e-5)
  assert info.seconds == pytest.approx(17 / fps, rel=1e-5)
  assert info.frames_at(fps) == 17
