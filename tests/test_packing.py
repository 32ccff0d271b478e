"""Rows hold every clip once an epoch, with little padding, and give each clip back."""

import itertools

import numpy as np
import pytest
from einops import rearrange
from etils import epath

from cogvideox_jax.data import packing
from cogvideox_jax.types import TEXT, VISION, Example


def tiny_lengths(clips: int) -> np.ndarray:
  """Of configs/tiny.py's mix: latents 8x8, 6x10 or 10x6, of 1, 3 or 5 frames."""
  rng = np.random.default_rng(0)
  sizes = np.array([(8, 8), (6, 10), (10, 6)])[rng.integers(3, size=clips)]
  frames = np.array([1, 3, 5])[rng.integers(3, size=clips)]
  latents = np.column_stack([frames, sizes])
  return packing.clip_tokens(latents, patch=(1, 2, 2), text_length=24)


def paper_lengths(clips: int) -> np.ndarray:
  """Images to 49 frames, five aspects, short sides of 256 and 512, as CogVideoX tokens."""
  rng = np.random.default_rng(0)
  short = np.array([16, 32])[rng.integers(2, size=clips)]
  long = (short * np.array([1, 4 / 3, 3 / 4, 16 / 9, 9 / 16])[rng.integers(5, size=clips)]).round()
  frames = np.array([1, 3, 5, 9, 13])[rng.integers(5, size=clips)]
  return (226 + frames * short * long).astype(np.int64)


def rows_of(epoch: packing.Epoch) -> list[list[int]]:
  return [part.tolist() for part in np.split(epoch.clips, epoch.starts[1:-1])]


@pytest.mark.parametrize(
  ("lengths", "row_tokens", "max_clips", "padding"),
  [
    (tiny_lengths(2000), 512, 12, 0.08),
    (tiny_lengths(300), 512, 12, 0.08),
    (paper_lengths(20_000), 25_600, 64, 0.03),
    (paper_lengths(20_000), 75_776, 96, 0.03),
  ],
)
def test_rows_are_full_and_never_too_full(lengths, row_tokens, max_clips, padding):
  layout = packing.plan_layout(lengths, row_tokens, max_clips)
  tokens = np.bincount(layout.rows, weights=layout.lengths)
  assert tokens.max() <= row_tokens
  assert np.bincount(layout.rows).max() <= max_clips
  assert 1 - lengths.sum() / (layout.num_rows * row_tokens) <= padding
  np.testing.assert_array_equal(np.sort(layout.lengths), np.sort(lengths))


def test_the_most_clips_a_row_may_hold_is_kept_when_it_is_what_limits():
  layout = packing.plan_layout(np.full(100, 10), row_tokens=512, max_clips=7)
  assert np.bincount(layout.rows).tolist() == [7] * 14 + [2]


def test_every_epoch_holds_every_clip_once_in_rows_of_the_planned_lengths():
  lengths = tiny_lengths(500)
  layout = packing.plan_layout(lengths, 512, 12)
  planned = sorted(sorted(layout.lengths[layout.rows == r]) for r in range(layout.num_rows))
  for number in range(3):
    rows = rows_of(packing.plan_epoch(layout, lengths, seed=1, epoch=number))
    assert sorted(itertools.chain(*rows)) == list(range(500))
    assert sorted(sorted(lengths[row]) for row in rows) == planned


def test_epochs_and_seeds_differ_and_the_same_ones_agree():
  lengths = tiny_lengths(500)
  layout = packing.plan_layout(lengths, 512, 12)
  plans = [
    packing.plan_epoch(layout, lengths, seed, epoch).clips.tolist()
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (-1, 0), (0, 0)]
  ]
  assert plans[0] == plans[4]
  assert len({tuple(plan) for plan in plans}) == 4


def test_a_clip_meets_other_clips_in_each_epoch():
  lengths = tiny_lengths(500)
  layout = packing.plan_layout(lengths, 512, 12)
  partners = set()
  for number in range(60):
    rows = rows_of(packing.plan_epoch(layout, lengths, 0, number))
    partners.update(*(row for row in rows if 0 in row))
  assert len(partners) > 150


def test_the_place_in_a_row_says_nothing_of_the_length():
  """A clip's timestep is drawn by its place."""
  lengths = tiny_lengths(2000)
  layout = packing.plan_layout(lengths, 512, 12)
  rows = rows_of(packing.plan_epoch(layout, lengths, 0, 0))
  places = np.concatenate([np.arange(len(row)) / (len(row) - 1) for row in rows])
  placed = lengths[np.concatenate(rows)]
  for length in np.unique(lengths):
    mine = places[placed == length]
    assert abs(mine.mean() - 0.5) < 4 * mine.std() / np.sqrt(len(mine)), length


def test_random_words_are_the_same_for_ever():
  """A checkpoint's run must go on with the same data under any later NumPy."""
  assert packing.random_words(2, 3, 1, 4).tolist() == [6477234659020228069, 16602396290753089574]


def test_captions_are_dropped_at_the_rate_anew_each_epoch():
  drops = np.array([packing.dropped(0.1, 2000, seed=0, epoch=e) for e in range(20)])
  assert abs(drops.mean() - 0.1) < 4 * np.sqrt(0.09 / drops.size)
  assert drops.any(axis=0).mean() > 0.8  # 1 - 0.9^20 = 0.88 of the clips, some time.
  assert not packing.dropped(0.0, 2000, 0, 0).any()
  assert packing.dropped(1.0, 2000, 0, 0).all()


def test_a_layout_is_read_from_its_file_and_a_damaged_file_is_made_again(tmp_path, monkeypatch):
  folder, lengths = epath.Path(tmp_path / "plans"), tiny_lengths(200)
  layout = packing.cached_layout(lengths, 512, 12, folder)
  (path,) = folder.iterdir()
  with monkeypatch.context() as patch:
    patch.setattr(packing, "plan_layout", None)
    again = packing.cached_layout(np.random.default_rng(0).permutation(lengths), 512, 12, folder)
  np.testing.assert_array_equal(again, layout)

  for damaged in (b"", path.read_bytes()[:100], b"not numpy"):
    path.write_bytes(damaged)
    np.testing.assert_array_equal(packing.cached_layout(lengths, 512, 12, folder), layout)
    with np.load(path) as arrays:
      np.testing.assert_array_equal(arrays["rows"], layout.rows)
  packing.cached_layout(lengths, 512, 11, folder)
  packing.cached_layout(lengths[1:], 512, 12, folder)
  assert len(list(folder.iterdir())) == 3


def test_a_folder_that_cannot_be_written_does_not_stop_planning(tmp_path):
  (tmp_path / "plans").write_text("a file where the folder should be")
  layout = packing.cached_layout(tiny_lengths(200), 512, 12, epath.Path(tmp_path / "plans"))
  assert layout.num_rows > 1


def draw_example(frames: int, height: int, width: int) -> Example:
  rng = np.random.default_rng(frames + height)
  mean, logvar = rng.normal(size=(2, frames, height, width, 3)).astype(np.float16)
  text = rng.normal(size=(5, 7)).astype(np.float32)
  return Example(mean, logvar, text, "c", "s", 4 * frames - 3, 8 * height, 8 * width, 8.0)


@pytest.mark.parametrize("patch", [(1, 2, 2), (3, 2, 1)])
def test_packing_gives_every_clip_back(patch):
  examples = [draw_example(3, 4, 6), draw_example(6, 2, 2), draw_example(3, 6, 2)]
  row = packing.pack(examples, patch=patch, row_tokens=150, max_clips=4)
  assert row.mean.dtype == row.logvar.dtype == np.float16  # As stored, for any type.
  for segment, example in enumerate(examples, start=1):
    mine = row.segment_ids[0] == segment
    experts, places = row.experts[0, mine], row.coordinates[0, mine]
    vision = experts == VISION
    assert experts.tolist() == [TEXT] * 5 + [VISION] * int(vision.sum())
    assert places[~vision].tolist() == [[n, 0, 0] for n in range(5)]
    np.testing.assert_array_equal(row.text[0, segment - 1], example.text)
    f, h, w = row.grids[0, segment]
    assert places[vision].tolist() == [
      [a, b, c] for a in range(f) for b in range(h) for c in range(w)
    ]
    for packed, latents in ((row.mean, example.mean), (row.logvar, example.logvar)):
      t, y, x = patch
      tokens = packed[0, mine][vision]
      unpacked = rearrange(
        tokens, "(f h w) (c t y x) -> (f t) (h y) (w x) c", f=f, h=h, t=t, y=y, x=x
      )
      np.testing.assert_array_equal(unpacked, latents)


def test_padding_stands_last_and_is_empty():
  examples = [draw_example(3, 4, 6), draw_example(6, 2, 2)]
  row = packing.pack(examples, patch=(1, 2, 2), row_tokens=60, max_clips=4)
  used = 5 + 18 + 5 + 6
  assert row.segment_ids[0].tolist() == [1] * 23 + [2] * 11 + [0] * (60 - used)
  assert (row.experts[0, used:] == VISION).all()
  assert not row.mean[0, used:].any()
  assert not row.coordinates[0, used:].any()
  assert not row.mean[0][row.experts[0] == TEXT].any()
  assert not row.text[0, 2:].any()
  assert row.grids[0].tolist() == [[1, 1, 1], [3, 2, 3], [6, 1, 1], [1, 1, 1], [1, 1, 1]]
