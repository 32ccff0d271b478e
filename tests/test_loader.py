"""Batch k is a function of (seed, dataset, k): not of threads, starts or hosts."""

import itertools
import threading

import numpy as np
import pytest

from cogvideox_jax.data import packing
from cogvideox_jax.data.loader import Loader
from cogvideox_jax.data.records import Dataset, ShardWriter
from cogvideox_jax.errors import UserError
from cogvideox_jax.types import TEXT, VISION, Batch, Example

CLIPS, ROWS, ROW_TOKENS, MAX_CLIPS = 90, 8, 120, 5
SIZES = [(8, 8), (6, 10), (10, 6)]


def draw_example(number: int) -> Example:
  """A clip whose every number says which clip it is, from 1."""
  frames, (height, width) = (1, 3, 5)[number % 3], SIZES[number // 3 % 3]
  mean = np.full((frames, height, width, 2), number + 1, np.float32)
  text = np.full((8, 4), number + 1, np.float32)
  source = f"clip-{number}"
  return Example(mean, -mean, text, "", source, 4 * frames - 3, 8 * height, 8 * width, 8.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
  directory = tmp_path_factory.mktemp("dataset")
  writer = ShardWriter(directory, 3, "test")
  for shard in range(3):
    writer.write_shard(shard, [draw_example(n) for n in range(30 * shard, 30 * shard + 30)])
  writer.finalize()
  return Dataset(directory)


def make_loader(dataset, **changes) -> Loader:
  arguments = {
    "rows": ROWS,
    "row_tokens": ROW_TOKENS,
    "max_clips": MAX_CLIPS,
    "patch": (1, 2, 2),
    "seed": 7,
    "drop": "zeros",
    "drop_rate": 0.1,
    "validation_fraction": 0.0,
  }
  return Loader(dataset, **{**arguments, **changes})


def assert_equal(one: Batch, other: Batch):
  for name, a, b in zip(Batch._fields, one, other, strict=True):
    np.testing.assert_array_equal(a, b, err_msg=name)


def clips_of(batch: Batch) -> list[list[int]]:
  """Which clips stand in each row, read from the latents themselves."""
  rows = []
  for mean, experts, segment_ids in zip(batch.mean, batch.experts, batch.segment_ids, strict=True):
    clips = []
    for segment in range(1, segment_ids.max() + 1):
      (value,) = set(mean[(segment_ids == segment) & (experts == VISION)].flat)
      clips.append(int(value) - 1)
    rows.append(clips)
  return rows


def test_every_clip_is_read_exactly_once_an_epoch(dataset):
  loader = make_loader(dataset)
  epochs = 3
  batches = -(-epochs * loader.rows_per_epoch // ROWS)
  rows = [row for k in range(batches) for row in clips_of(loader.batch(k))]
  for epoch in range(epochs):
    start = epoch * loader.rows_per_epoch
    of_epoch = rows[start : start + loader.rows_per_epoch]
    assert sorted(itertools.chain(*of_epoch)) == list(range(CLIPS))
  assert rows[: loader.rows_per_epoch] != rows[loader.rows_per_epoch : 2 * loader.rows_per_epoch]


def test_the_plan_says_what_the_rows_hold(dataset):
  loader = make_loader(dataset)
  for k in (0, 3, 1000):
    batch = loader.batch(k)
    rows = [loader.row(k * ROWS + r) for r in range(ROWS)]
    assert clips_of(batch) == [row.clips.tolist() for row in rows]
    assert loader.epoch(k) == rows[0].epoch == k * ROWS // loader.rows_per_epoch
    assert loader.padding_fraction(k) == pytest.approx((batch.segment_ids == 0).mean())


def test_batches_have_one_shape_and_each_clip_its_own_caption(dataset):
  batch = make_loader(dataset, drop_rate=0.0).batch(2)
  assert batch.mean.shape == batch.logvar.shape == (ROWS, ROW_TOKENS, 8)
  assert batch.text.shape == (ROWS, MAX_CLIPS, 8, 4)
  assert batch.segment_ids.shape == batch.experts.shape == (ROWS, ROW_TOKENS)
  assert batch.coordinates.shape == (ROWS, ROW_TOKENS, 3)
  assert batch.grids.shape == (ROWS, MAX_CLIPS + 1, 3)
  np.testing.assert_array_equal(batch.logvar, -batch.mean)
  for row, clips in enumerate(clips_of(batch)):
    expected = [clip + 1 for clip in clips] + [0] * (MAX_CLIPS - len(clips))
    assert batch.text[row, :, 0, 0].tolist() == expected
    assert (batch.experts[row] == TEXT).sum() == 8 * len(clips)


@pytest.mark.parametrize(("num_threads", "prefetch_batches"), [(1, 1), (8, 3), (0, 0), (16, 1)])
def test_threads_and_prefetch_change_nothing(dataset, num_threads, prefetch_batches):
  loader = make_loader(dataset, num_threads=num_threads, prefetch_batches=prefetch_batches)
  for start in (0, 5):
    batches = loader.iterate(start)
    for k, batch in enumerate(itertools.islice(batches, 6), start):
      assert_equal(batch, make_loader(dataset).batch(k))
    batches.close()


def test_any_number_of_hosts_reads_the_same_batches(dataset):
  whole = make_loader(dataset)
  for hosts in (2, 4, 8):
    loaders = [make_loader(dataset, process_index=h, process_count=hosts) for h in range(hosts)]
    streams = [loader.iterate(2) for loader in loaders]
    for k in range(2, 5):
      parts = [next(stream) for stream in streams]
      assert_equal(Batch(*map(np.concatenate, zip(*parts, strict=True))), whole.batch(k))
    for stream in streams:
      stream.close()
    assert {loader.padding_fraction(3) for loader in loaders} == {whole.padding_fraction(3)}


def test_a_far_step_plans_its_own_epoch_only(dataset, monkeypatch):
  planned = []

  def plan_epoch(layout, lengths, seed, epoch):
    planned.append(epoch)
    return plan(layout, lengths, seed, epoch)

  plan = packing.plan_epoch
  monkeypatch.setattr(packing, "plan_epoch", plan_epoch)
  loader = make_loader(dataset, prefetch_batches=1)
  batches = loader.iterate(1_000_000)
  batch = next(batches)
  batches.close()
  assert_equal(batch, loader.batch(1_000_000))
  assert min(planned) == loader.epoch(1_000_000)
  assert len(set(planned)) <= 3


def test_seeds_give_other_orders_of_the_same_rows_of_lengths(dataset):
  one, other = make_loader(dataset), make_loader(dataset, seed=8)
  assert one.rows_per_epoch == other.rows_per_epoch
  assert clips_of(one.batch(0)) != clips_of(other.batch(0))


@pytest.mark.parametrize("drop", ["zeros", np.full((8, 4), 0.5, np.float32)])
def test_a_dropped_caption_is_replaced_and_the_latents_stay(dataset, drop):
  loader = make_loader(dataset, drop=drop, drop_rate=0.5)
  kept = make_loader(dataset, drop_rate=0.0)
  replacement = 0 if isinstance(drop, str) else 0.5
  dropped = total = 0
  for k in range(12):
    batch, full = loader.batch(k), kept.batch(k)
    assert_equal(batch._replace(text=full.text), full)
    for row, clips in enumerate(clips_of(batch)):
      for place in range(len(clips)):
        text, caption = batch.text[row, place], full.text[row, place]
        assert (text == replacement).all() or (text == caption).all()
        dropped += bool((text == replacement).all())
        total += 1
  assert abs(dropped / total - 0.5) < 4 * np.sqrt(0.25 / total)


def test_the_validation_split_is_held_out_and_always_the_same(dataset):
  train = make_loader(dataset, validation_fraction=0.2, drop_rate=1.0)
  held_out = make_loader(dataset, validation_fraction=0.2, drop_rate=1.0, split="validation")
  other = make_loader(dataset, validation_fraction=0.2, seed=99, split="validation")

  def clips_in(loader: Loader, epoch: int) -> list[int]:
    rows = range(epoch * loader.rows_per_epoch, (epoch + 1) * loader.rows_per_epoch)
    return [clip for row in rows for clip in loader.row(row).clips.tolist()]

  assert sorted(clips_in(train, 0) + clips_in(held_out, 0)) == list(range(CLIPS))
  assert 0.1 < len(clips_in(held_out, 0)) / CLIPS < 0.35
  assert clips_in(held_out, 0) == clips_in(held_out, 3) == clips_in(other, 0)
  assert held_out.batch(0).text.any()
  assert not train.batch(0).text.any()


def test_a_clip_stays_in_its_split_when_others_are_added(dataset, tmp_path):
  writer = ShardWriter(tmp_path, 1, "test")
  writer.write_shard(0, [draw_example(n) for n in range(40, 120)])
  writer.finalize()

  def held_out(data: Dataset) -> set[str]:
    loader = make_loader(data, validation_fraction=0.3, split="validation")
    rows = range(loader.rows_per_epoch)
    return {data.source(int(clip)) for row in rows for clip in loader.row(row).clips}

  shared = {f"clip-{n}" for n in range(40, CLIPS)}
  assert held_out(dataset) & shared == held_out(Dataset(tmp_path)) & shared


def test_clips_longer_than_a_row_are_left_out_and_reported(dataset, caplog):
  loader = make_loader(dataset, row_tokens=60)
  assert set(loader.unpackable) == {n for n in range(CLIPS) if n % 3 == 2}
  assert "30 of 90 train clips are longer than a row of 60 tokens" in caplog.text
  rows = range(loader.rows_per_epoch)
  packed = sorted(clip for row in rows for clip in loader.row(row).clips.tolist())
  assert packed == [n for n in range(CLIPS) if n % 3 != 2]


def test_an_iterator_that_is_closed_leaves_no_thread(dataset):
  before = set(threading.enumerate())
  batches = make_loader(dataset).iterate()
  next(batches)
  assert set(threading.enumerate()) - before
  batches.close()
  for thread in set(threading.enumerate()) - before:
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"process_count": 3}, "8 rows cannot be shared equally by 3 hosts"),
    ({"row_tokens": 20}, "the\nshortest has 23: raise row_tokens"),
    ({"patch": (1, 4, 2)}, r"'clip-3' in .* has \(f, h, w\) latents\n\(1, 6, 10\)"),
    ({"split": "validation"}, "validation split:\nchange config.data.validation_fraction"),
    ({"drop": np.zeros((8, 5), np.float32)}, r"an empty prompt is \(8, 5\) numbers"),
  ],
)
def test_numbers_that_do_not_fit_the_dataset_are_a_clear_message(dataset, changes, message):
  with pytest.raises(UserError, match=message):
    make_loader(dataset, **changes)
