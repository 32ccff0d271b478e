"""The embedded clips: what they say, what they show, what they hold out, and their files."""

import itertools
import json
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from cogvideox_jax.data import shape_clips, shape_scenes, video
from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"
SIZES, DURATIONS = ((64, 64), (48, 80), (80, 48)), (1, 9, 17)
WORDS = (
  shape_scenes.COLOURS,
  shape_scenes.SHAPES,
  tuple(shape_scenes.MOTIONS),
  shape_scenes.BACKGROUNDS,
)


def render_dataset(folder, clips=12, seed=0, fps=8.0):
  return shape_clips.render_dataset(folder, clips, seed, sizes=SIZES, durations=DURATIONS, fps=fps)


def drawn_scenes(count: int, moving: bool = True) -> list[shape_scenes.Scene]:
  rng = np.random.default_rng(5)
  return [shape_scenes.draw_scene(rng, moving) for _ in range(count)]


def words_of(scene: shape_scenes.Scene) -> list[tuple]:
  return [(*thing, scene.background) for thing in scene.objects]


@pytest.mark.parametrize("moving", [True, False])
def test_a_caption_says_all_of_its_scene(moving):
  for scene in drawn_scenes(1000, moving):
    assert shape_scenes.parse(shape_scenes.caption(scene)) == scene


@pytest.mark.parametrize(
  "text",
  [
    "",
    "a red circle",
    "a red circle moves right on a blue background.",
    "a red circle moves sideways on a blue background",
    "a red circle runs right on a blue background",
    "a red ball moves right on a blue background",
    "a teal circle moves right on a blue background",
    "a red circle moves right on a purple background",
    "a red circle and a green circle and a white circle on a blue background",
    "a big red circle on a blue background",
  ],
)
def test_what_is_not_a_caption_is_refused(text):
  with pytest.raises(ValueError, match="not a caption"):
    shape_scenes.parse(text)


def test_every_caption_fits_the_tiny_model_s_text():
  things = [
    shape_scenes.Thing(*words) for words in itertools.product(*WORDS[:2], (*WORDS[2], None))
  ]
  pairs = [shape_scenes.Scene(pair, "blue") for pair in itertools.product(things, repeat=2)]
  grounds = [shape_scenes.Scene((things[0],), ground) for ground in shape_scenes.BACKGROUNDS]
  tokenizer = Tokenizer(epath.resource_path("cogvideox_jax") / "assets" / "tiny" / "tokenizer")
  lengths = (tokenizer.encode([shape_scenes.caption(s) for s in pairs + grounds], 226) != 0).sum(
    axis=1
  )
  assert lengths[: len(pairs)].max() == 19
  assert len(set(lengths[len(pairs) :])) == 1  # So any background is as long as blue.


def test_held_out_prompts_are_distinct_and_balanced_over_every_word():
  assert len(set(shape_scenes.held_out_prompts())) == 64
  for count in (16, 30, 64):
    scenes = map(shape_scenes.parse, shape_scenes.held_out_prompts(count))
    columns = zip(*(words_of(scene)[0] for scene in scenes), strict=True)
    for column, words in zip(columns, WORDS, strict=True):
      times = [Counter(column)[word] for word in words]
      assert max(times) - min(times) <= 2, times


def test_no_object_of_a_scene_is_held_out():
  held_out = {words_of(scene)[0] for scene in shape_scenes.held_out_scenes()}
  shown = [words for scene in drawn_scenes(3000) for words in words_of(scene)]
  assert not held_out & set(shown)
  # Nor is anything else missing: what is not held out is all shown.
  assert len(set(shown)) == 6 * 3 * 5 * 5 - 4 * 3 * 5 - len(held_out)
  for i, j in itertools.combinations(range(4), 2):
    pairs = {(words[i], words[j]) for words in shown}
    assert pairs == {p for p in itertools.product(WORDS[i], WORDS[j]) if p[0] != p[1]}


def test_previews_of_training_show_no_held_out_prompt(monkeypatch):
  monkeypatch.syspath_prepend(CONFIGS.parent)
  config = runpy.run_path(str(CONFIGS / "tiny.py"))["get_config"]()
  assert not set(config.preview.prompts) & set(shape_scenes.held_out_prompts())


@pytest.mark.parametrize("num_frames", [9, 17, 49])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_objects_stay_whole_in_the_frame_and_never_meet(num_frames, height, width):
  rng = np.random.default_rng(6)
  for scene in drawn_scenes(30):
    frames = shape_clips.render(scene, num_frames, height, width, rng).astype(float)
    ground = shape_scenes.PALETTE[scene.background]
    seen = np.abs(frames - ground).sum(axis=(1, 2, 3))  # Falls when an object is hidden or cut.
    np.testing.assert_allclose(seen, seen[0], rtol=0.03, err_msg=shape_scenes.caption(scene))


@pytest.mark.parametrize(("num_frames", "least", "most"), [(9, 0.19, 0.26), (17, 0.39, 0.51)])
def test_objects_travel_as_captioned_at_constant_speed(num_frames, least, most):
  rng = np.random.default_rng(7)
  height, width = 48, 80
  for motion, direction in shape_scenes.MOTIONS.items():
    scene = shape_scenes.Scene((shape_scenes.Thing("red", "circle", motion),), "blue")
    frames = shape_clips.render(scene, num_frames, height, width, rng).astype(float)
    mass = np.abs(frames - shape_scenes.PALETTE["blue"]).sum(axis=-1)
    mass /= mass.sum(axis=(1, 2), keepdims=True)
    x = mass.sum(axis=1) @ np.arange(width) / width
    y = mass.sum(axis=2) @ np.arange(height) / height
    steps = np.diff([x, y], axis=1)
    travel = steps.sum(axis=1)
    np.testing.assert_allclose(
      steps.T, np.tile(travel / steps.shape[1], (len(x) - 1, 1)), atol=2e-3
    )
    distance = abs(travel).max()
    assert (least < distance < most) if any(direction) else distance == 0
    np.testing.assert_allclose(travel, distance * np.array(direction), atol=1e-3)


def test_an_image_is_drawn_at_the_rate_it_should_be():
  lengths = Counter(len(shape_clips.draw_clip(i, 3, SIZES, DURATIONS)[1]) for i in range(400))
  assert lengths[1] / 400 == pytest.approx(0.15, abs=0.06)
  assert lengths[17] > lengths[9] > lengths[1]
  assert {len(shape_clips.draw_clip(i, 3, SIZES, (1,))[1]) for i in range(5)} == {1}
  assert {len(shape_clips.draw_clip(i, 3, SIZES, (9,))[1]) for i in range(40)} == {9}


def test_files_show_what_the_manifest_says(tmp_path):
  manifest = render_dataset(tmp_path / "clips")
  items = [json.loads(line) for line in manifest.read_text().splitlines()]
  assert [item["id"] for item in items] == [f"clip_{index:06d}" for index in range(12)]
  kinds = set()
  for index, item in enumerate(items):
    scene, frames = shape_clips.draw_clip(index, 0, SIZES, DURATIONS)
    assert item["caption"] == shape_scenes.caption(scene)
    file = Path(manifest.parent / item["file"])
    num_frames, height, width, _ = frames.shape
    if num_frames == 1:
      read = np.asarray(Image.open(file))[None]
    else:
      read = video.read(file, fps=8.0, num_frames=num_frames, height=height, width=width)
    assert np.abs(read.astype(float) - frames).mean() < 3
    kinds.add(file.suffix)
  assert kinds == {".png", ".mp4"}


def contents(folder: Path) -> dict[str, bytes]:
  return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_same_seed_writes_the_same_files(tmp_path):
  for name, arguments in {"a": {}, "b": {}, "seed": {"seed": 1}, "more": {"clips": 14}}.items():
    render_dataset(tmp_path / name, **arguments)
  first, again = contents(tmp_path / "a"), contents(tmp_path / "b")
  assert first == again
  assert first["manifest.jsonl"] != contents(tmp_path / "seed")["manifest.jsonl"]
  more = contents(tmp_path / "more")
  assert more["manifest.jsonl"].startswith(first["manifest.jsonl"])


def test_a_finished_dataset_is_left_alone_and_an_unfinished_one_is_finished(tmp_path):
  manifest = Path(render_dataset(tmp_path))
  lines, clip = manifest.read_text(), tmp_path / "clip_000003.mp4"
  clip.write_bytes(b"touched")
  assert Path(render_dataset(tmp_path)) == manifest
  assert clip.read_bytes() == b"touched"
  manifest.unlink()  # As if the first call had been killed before its end.
  render_dataset(tmp_path)
  assert manifest.read_text() == lines
  assert clip.read_bytes() != b"touched"


def test_a_folder_of_other_clips_is_refused_and_kept(tmp_path):
  render_dataset(tmp_path / "ours")
  before = contents(tmp_path / "ours")
  for arguments in ({"seed": 1}, {"clips": 13}, {"fps": 16.0}):
    with pytest.raises(UserError, match=r"already holds other clips[^$]*wanted"):
      render_dataset(tmp_path / "ours", **arguments)
  assert contents(tmp_path / "ours") == before
  (tmp_path / "theirs").mkdir()
  (tmp_path / "theirs" / "manifest.jsonl").write_text("{}\n")
  with pytest.raises(UserError, match="already holds other clips"):
    render_dataset(tmp_path / "theirs")


def test_numbers_that_make_no_dataset_are_refused(tmp_path):
  with pytest.raises(UserError, match=r"config\.data\.clips"):
    render_dataset(tmp_path, clips=0)
  with pytest.raises(UserError, match="there are 1 to 64"):
    shape_scenes.held_out_prompts(65)


def test_a_score_says_how_clearly_an_object_stands_out(tmp_path):
  manifest = render_dataset(tmp_path / "clips")
  items = [json.loads(line) for line in manifest.read_text().splitlines()]
  for index, item in enumerate(items):
    _, frames = shape_clips.draw_clip(index, 0, SIZES, DURATIONS)
    assert item["score"] == pytest.approx(shape_clips.contrast(frames), abs=1e-4)

  ground = np.full((2, 8, 8, 3), 20, np.uint8)
  assert shape_clips.contrast(ground) == 0
  part = ground.copy()
  part[:, :4, :4] = (220, 40, 40)  # A quarter of the frame.
  distance = np.sqrt(200**2 + 2 * 20**2) / 255
  assert shape_clips.contrast(part) == pytest.approx(distance * np.sqrt(0.25 * 0.75))
  smaller, fainter = ground.copy(), ground.copy()
  smaller[:, :2, :2], fainter[:, :4, :4] = (220, 40, 40), (80, 20, 20)
  assert shape_clips.contrast(smaller) < shape_clips.contrast(part) > shape_clips.contrast(fainter)
