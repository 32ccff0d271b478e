"""The score of generated shapes: right on rendered clips however they are spoilt, low elsewhere."""

import numpy as np
import pytest
from scipy import ndimage

from cogvideox_jax.data import shape_clips, shape_scenes, video
from cogvideox_jax.data.mp4 import write_mp4
from cogvideox_jax.evaluation.shape_scores import Reading, read_scene, score

PARTS = ("background", "colour", "motion", "shape")
CLIPS = 32


def rendered(num_frames: int, height: int, width: int, count: int = CLIPS):
  """Clips of one object, and their captions."""
  rng = np.random.default_rng(num_frames + height)
  scenes = []
  while len(scenes) < count:
    scene = shape_scenes.draw_scene(rng, moving=True)
    scenes += [scene] if len(scene.objects) == 1 else []
  videos = [shape_clips.render(scene, num_frames, height, width, rng) for scene in scenes]
  return videos, [shape_scenes.caption(scene) for scene in scenes]


def compressed(frames, path):
  num_frames, height, width, _ = frames.shape
  write_mp4(path, frames, 8.0)
  return video.read(path, fps=8.0, num_frames=num_frames, height=height, width=width)


def blurred(frames, _):
  return ndimage.gaussian_filter(frames, sigma=(0, 1.5, 1.5, 0))


def noisy(frames, _):
  noise = np.random.default_rng(frames.size).normal(0, 15, frames.shape)
  return np.clip(frames + noise, 0, 255).astype(np.uint8)


def whole(frames, _):
  return frames


@pytest.mark.parametrize("spoil", [whole, compressed, blurred, noisy])
@pytest.mark.parametrize("extent", [(17, 64, 64), (9, 64, 64), (9, 48, 80), (17, 80, 48)])
def test_rendered_clips_are_read_right(extent, spoil, tmp_path):
  videos, captions = rendered(*extent)
  spoilt = [spoil(frames, tmp_path / "clip.mp4") for frames in videos]
  scores = score(spoilt, captions)
  assert tuple(scores) == PARTS
  assert min(scores.values()) >= 0.99, scores


def test_held_out_prompts_can_all_be_scored():
  captions = shape_scenes.held_out_prompts()
  rng = np.random.default_rng(0)
  videos = [
    shape_clips.render(shape_scenes.parse(caption), 17, 64, 64, rng) for caption in captions
  ]
  assert score(videos, captions) == dict.fromkeys(PARTS, 1.0)


def test_a_wrong_word_costs_its_own_part_only():
  right = "a red circle moves right on a blue background"
  frames = shape_clips.render(shape_scenes.parse(right), 17, 64, 64, np.random.default_rng(1))
  wrong = {
    "background": right.replace("blue", "green"),
    "colour": right.replace("red", "yellow"),
    "motion": right.replace("moves right", "stays still"),
    "shape": right.replace("circle", "square"),
  }
  for part, caption in wrong.items():
    assert score([frames], [caption]) == {name: float(name != part) for name in PARTS}
  assert score([frames, frames], [right, wrong["shape"]])["shape"] == 0.5


def test_captions_of_other_clips_score_as_chance_does():
  videos, captions = rendered(17, 64, 64, 100)
  scores = score(videos, list(np.random.default_rng(2).permutation(captions)))
  assert scores["shape"] < 0.45  # Chance is a third,
  assert max(scores["background"], scores["colour"], scores["motion"]) < 0.32  # and a fifth.


def test_noise_and_plain_frames_show_nothing():
  rng = np.random.default_rng(3)
  noise = rng.integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
  clouds = ndimage.gaussian_filter(noise.astype(float), sigma=(0, 4, 4, 0))
  clouds = np.clip((clouds - 127) * 8 + 127, 0, 255).astype(np.uint8)
  for frames in (noise, clouds, np.full_like(noise, 127)):
    assert read_scene(frames) == Reading("none", "none", "none", "none")
  black = np.zeros_like(noise)
  assert read_scene(black) == Reading("black", "none", "none", "none")


def test_an_object_that_vanishes_or_wanders_is_not_read_as_moving():
  rng = np.random.default_rng(4)
  moving = shape_scenes.parse("a red circle moves right on a blue background")
  frames = shape_clips.render(moving, 17, 64, 64, rng)
  assert read_scene(frames[::-1]).motion == "left"
  assert read_scene(frames.transpose(0, 2, 1, 3)).motion == "down"
  vanishing = frames.copy()
  vanishing[11:] = shape_scenes.PALETTE["blue"]
  assert read_scene(vanishing) == Reading("blue", "none", "none", "none")
  diagonal = np.stack([np.roll(frame, shift, axis=0) for shift, frame in enumerate(frames)])
  assert read_scene(np.roll(diagonal, 10, axis=0)).motion in ("none", "right")
  assert read_scene(frames[:1]).motion == "none"


def test_a_ring_or_a_pair_is_no_shape():
  x, y = np.meshgrid(np.arange(64) - 32, np.arange(64) - 32)
  radius = np.hypot(x, y)
  ring = (radius < 20) & (radius > 13)
  pair = (np.abs(y) < 5) & (np.abs(np.abs(x) - 18) < 8)
  for mask in (ring, pair):
    frames = np.where(
      mask[None, ..., None], shape_scenes.PALETTE["red"], shape_scenes.PALETTE["white"]
    )
    reading = read_scene(np.repeat(frames, 9, axis=0).astype(np.uint8))
    assert reading == Reading("white", "red", "still", "none")


def test_only_one_moving_object_can_be_scored():
  frames = np.zeros((9, 64, 64, 3), np.uint8)
  for caption in (
    "a red circle on a blue background",
    "a red circle moves up and a green square moves up on a blue background",
    "something else",
  ):
    with pytest.raises(ValueError, match=r"caption|one object"):
      score([frames], [caption])
  with pytest.raises(ValueError, match="0 videos"):
    score([], [])
