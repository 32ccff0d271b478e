"""The rows of one dataset: every clip once an epoch, each a function of (seed, dataset, number)."""

import itertools

import numpy as np
import pytest
from drawn_dataset import (
  MAX_CLIPS,
  ROW_TOKENS,
  assert_equal,
  draw_example,
  make_dataset,
  make_rows,
  numbers_of,
)

from cogvideox_jax.data import packing
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.rows import Rows
from cogvideox_jax.data.shards import ShardWriter
from cogvideox_jax.errors import UserError
from cogvideox_jax.types import TEXT

CLIPS = 90


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
  return make_dataset(tmp_path_factory.mktemp("dataset"), range(CLIPS), shards=3)


def clips_in(rows: Rows, epoch: int) -> list[int]:
  numbers = range(epoch * rows.per_epoch, (epoch + 1) * rows.per_epoch)
  return [clip for number in numbers for clip in rows[number].clips.tolist()]


def test_every_clip_is_read_exactly_once_an_epoch(dataset):
  rows = make_rows(dataset)
  epochs = []
  for epoch in range(3):
    numbers = range(epoch * rows.per_epoch, (epoch + 1) * rows.per_epoch)
    epochs.append([numbers_of(rows.read(number))[0] for number in numbers])
    assert sorted(itertools.chain(*epochs[-1])) == list(range(CLIPS))
  assert epochs[0] != epochs[1]


def test_the_plan_says_what_a_row_holds(dataset):
  rows = make_rows(dataset)
  for number in (0, 3, 1_000_000):
    row = rows[number]
    assert numbers_of(rows.read(number)) == [row.clips.tolist()]
    assert row.epoch == number // rows.per_epoch


def test_rows_have_one_shape_and_each_clip_its_own_caption(dataset):
  rows = make_rows(dataset, drop_rate=0.0)
  row, clips = rows.read(5), rows[5].clips.tolist()
  assert row.mean.shape == row.logvar.shape == (1, ROW_TOKENS, 8)
  assert row.text.shape == (1, MAX_CLIPS, 8, 4)
  assert row.segment_ids.shape == row.experts.shape == (1, ROW_TOKENS)
  assert row.coordinates.shape == (1, ROW_TOKENS, 3)
  assert row.grids.shape == (1, MAX_CLIPS + 1, 3)
  np.testing.assert_array_equal(row.logvar, -row.mean)
  expected = [clip + 1 for clip in clips] + [0] * (MAX_CLIPS - len(clips))
  assert row.text[0, :, 0, 0].tolist() == expected
  assert (row.experts == TEXT).sum() == 8 * len(clips)


def test_a_far_row_plans_its_own_epoch_only(dataset, monkeypatch):
  planned = []

  def plan_epoch(layout, lengths, seed, epoch):
    planned.append(epoch)
    return plan(layout, lengths, seed, epoch)

  plan = packing.plan_epoch
  monkeypatch.setattr(packing, "plan_epoch", plan_epoch)
  rows = make_rows(dataset)
  assert_equal(rows.read(8_000_000), make_rows(dataset).read(8_000_000))
  assert planned == [8_000_000 // rows.per_epoch] * 2


def test_seeds_give_other_orders_of_the_same_rows_of_lengths(dataset):
  one, other = make_rows(dataset), make_rows(dataset, seed=8)
  assert one.per_epoch == other.per_epoch
  assert clips_in(one, 0) != clips_in(other, 0)


@pytest.mark.parametrize("drop", ["zeros", np.full((8, 4), 0.5, np.float32)])
def test_a_dropped_caption_is_replaced_and_the_latents_stay(dataset, drop):
  rows = make_rows(dataset, drop=drop, drop_rate=0.5)
  kept = make_rows(dataset, drop_rate=0.0)
  replacement = 0 if isinstance(drop, str) else 0.5
  for number in range(100):
    row, full = rows.read(number), kept.read(number)
    assert_equal(row._replace(text=full.text), full)
    epoch, clips = rows[number]
    dropped = packing.dropped(0.5, CLIPS, seed=7, epoch=epoch)[clips]
    for place, drops in enumerate(dropped):
      expected = replacement if drops else full.text[0, place]
      np.testing.assert_array_equal(row.text[0, place], np.broadcast_to(expected, (8, 4)))


def test_the_validation_split_is_held_out_and_always_the_same(dataset):
  train = make_rows(dataset, validation_fraction=0.2, drop_rate=1.0)
  held_out = make_rows(dataset, validation_fraction=0.2, drop_rate=1.0, split="validation")
  other = make_rows(dataset, validation_fraction=0.2, seed=99, split="validation")
  assert sorted(clips_in(train, 0) + clips_in(held_out, 0)) == list(range(CLIPS))
  assert 0.1 < len(clips_in(held_out, 0)) / CLIPS < 0.35
  assert clips_in(held_out, 0) == clips_in(held_out, 3) == clips_in(other, 0)
  assert held_out.read(0).text.any()
  assert not train.read(0).text.any()


def test_a_clip_stays_in_its_split_when_others_are_added(dataset, tmp_path):
  def held_out(data: Dataset) -> set[str]:
    rows = make_rows(data, validation_fraction=0.3, split="validation")
    return {data.source(clip) for clip in clips_in(rows, 0)}

  shared = {f"clip-{n}" for n in range(40, CLIPS)}
  other = make_dataset(tmp_path, range(40, 120))
  assert held_out(dataset) & shared == held_out(other) & shared


def test_clips_longer_than_a_row_are_left_out_and_reported(dataset, caplog):
  rows = make_rows(dataset, row_tokens=60)
  assert set(rows.unpackable) == {n for n in range(CLIPS) if n % 3 == 2}
  assert "30 of 90 train clips are longer than a row of 60 tokens" in caplog.text
  assert sorted(clips_in(rows, 0)) == [n for n in range(CLIPS) if n % 3 != 2]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"row_tokens": 20}, "the\nshortest has 23: raise row_tokens"),
    ({"patch": (1, 4, 2)}, r"'clip-3' in .* has \(f, h, w\) latents\n\(1, 6, 10\)"),
    ({"split": "validation"}, "validation split:\nchange config.data.validation_fraction"),
    ({"drop": np.zeros((8, 5), np.float32)}, r"an empty prompt is \(8, 5\) numbers"),
  ],
)
def test_numbers_that_do_not_fit_the_dataset_are_a_clear_message(dataset, changes, message):
  with pytest.raises(UserError, match=message):
    make_rows(dataset, **changes)


def test_a_stage_may_train_on_the_best_fraction_of_each_split(tmp_path):
  scores = [(7 * number) % 10 / 10 for number in range(60)]  # Six clips of each score.
  dataset = make_dataset(tmp_path, range(60), scores=scores)
  held_out = dataset.index.source_hash < 0.3 * 2.0**64
  for split, chosen in (("train", ~held_out), ("validation", held_out)):
    for best in (0.2, 0.5):
      rows = make_rows(dataset, split=split, validation_fraction=0.3, best=best)
      numbers = np.flatnonzero(chosen).tolist()
      ranked = sorted(numbers, key=lambda n: (-scores[n], dataset.index.source_hash[n]))
      assert rows.clips.tolist() == sorted(ranked[: round(best * len(numbers))])
      read = {clip for row in range(rows.per_epoch) for clip in numbers_of(rows.read(row))[0]}
      assert read == set(rows.clips.tolist())
  whole = make_rows(dataset, validation_fraction=0.3, best=1.0)
  assert whole.clips.tolist() == np.flatnonzero(~held_out).tolist()
  assert len(make_rows(dataset, best=0.001).clips) == 1


def test_the_best_clips_of_a_dataset_without_scores_are_not_guessed(tmp_path):
  scores = [0.5, None, 0.5, None, 0.5]
  dataset = make_dataset(tmp_path, range(5), scores=scores)
  make_rows(dataset)
  with pytest.raises(UserError) as caught:
    make_rows(dataset, best=0.2)
  message = str(caught.value)
  assert "60.0% have one; 'clip-1' has none" in message and '"score": 0.9' in message
  assert len(message.splitlines()) <= 8


def test_a_clip_of_one_frame_is_not_trained_on_as_its_own_image(tmp_path, caplog):
  examples = [draw_example(number) for number in range(9)]  # Every third has one frame.
  writer = ShardWriter(tmp_path, 1, "test")
  writer.write_shard(0, [x._replace(image=np.zeros((1, 2, *x.mean.shape[1:]))) for x in examples])
  writer.finalize()
  rows = make_rows(Dataset(tmp_path), with_images=True)
  assert rows.clips.tolist() == [1, 2, 4, 5, 7, 8]
  assert "3 of 9 clips of" in caplog.text and "its own image" in caplog.text
  assert len(make_rows(Dataset(tmp_path)).clips) == 9
