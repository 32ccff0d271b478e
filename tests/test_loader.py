"""Batch k is a function of (seed, datasets, weights, k): not of threads, starts or hosts."""

import itertools
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from drawn_dataset import assert_equal, make_dataset, make_rows, numbers_of
from waiting import PATIENCE

from cogvideox_jax.data import mixture, packing
from cogvideox_jax.data.loader import Loader
from cogvideox_jax.data.rows import Rows

ROWS = 8  # Of the global batch.
STATM = Path("/proc/self/statm")
IMAGES, VIDEOS, EXTRA = range(90), range(300, 360), range(600, 621)  # Numbers of clips.


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[str, Rows]:
  folder = tmp_path_factory.mktemp("datasets")
  parts = {"images": IMAGES, "videos": VIDEOS, "extra": EXTRA}
  return {name: make_rows(make_dataset(folder / name, numbers)) for name, numbers in parts.items()}


HISTORY = mixture.go_on(mixture.begin({"images": 1, "videos": 2}), {"images": 3, "extra": 1}, 40)


def make_loader(datasets, history=HISTORY, **changes) -> Loader:
  return Loader(datasets, history, **{"rows": ROWS, **changes})


def run_of(host: int, hosts: int) -> range:
  """The rows of a batch that a host reads, of hosts that share it in turn."""
  return range(host * ROWS // hosts, (host + 1) * ROWS // hosts)


@pytest.mark.parametrize(("num_threads", "prefetch_batches"), [(1, 1), (8, 3), (0, 0), (16, 1)])
def test_threads_and_prefetch_change_nothing(datasets, num_threads, prefetch_batches):
  loader = make_loader(datasets, num_threads=num_threads, prefetch_batches=prefetch_batches)
  for start in (0, 3):
    batches = loader.iterate(start)
    for k, batch in enumerate(itertools.islice(batches, 6), start):
      assert_equal(batch, make_loader(datasets).batch(k))
    batches.close()


def test_any_number_of_hosts_reads_the_same_batches(datasets):
  whole = make_loader(datasets)
  for hosts in (2, 4, 8):
    loaders = [make_loader(datasets, mine=run_of(host, hosts)) for host in range(hosts)]
    streams = [loader.iterate(3) for loader in loaders]
    for k in range(3, 7):
      assert_equal(packing.stack([next(stream) for stream in streams]), whole.batch(k))
    for stream in streams:
      stream.close()
    assert {loader.padding_fraction(3) for loader in loaders} == {whole.padding_fraction(3)}


def test_a_host_reads_the_rows_that_its_devices_hold_in_their_order(datasets):
  mine = (6, 1, 2)
  loader, whole = make_loader(datasets, mine=mine), make_loader(datasets)
  stream = loader.iterate(2)
  for k in (2, 3):
    assert loader.rows_of(k) == [k * ROWS + row for row in mine]
    wanted = packing.stack([whole._read(k * ROWS + row) for row in mine])
    assert_equal(next(stream), wanted)
    assert_equal(loader.batch(k), wanted)
  stream.close()


def test_hosts_that_come_and_go_read_every_clip_once_an_epoch_in_one_order(datasets):
  """Killed and started again on other hosts, threads and read-ahead, at random steps."""
  rng = np.random.default_rng(3)
  rows = datasets["images"]
  history = mixture.begin({"images": 1})
  epochs = 4
  batches = -(-epochs * rows.per_epoch // ROWS)
  read, step = [], 0
  while step < batches:
    hosts, threads, ahead = (int(rng.choice(choices)) for choices in ((1, 2, 4, 8), (1, 3), (1, 4)))
    streams = [
      make_loader(
        datasets,
        history,
        mine=run_of(host, hosts),
        num_threads=threads,
        prefetch_batches=ahead,
      ).iterate(step)
      for host in range(hosts)
    ]
    for _ in range(int(rng.integers(1, 6))):
      read += numbers_of(packing.stack([next(stream) for stream in streams]))
      step += 1
    for stream in streams:
      stream.close()
  for epoch in range(epochs):
    of_epoch = read[epoch * rows.per_epoch : (epoch + 1) * rows.per_epoch]
    assert sorted(itertools.chain(*of_epoch)) == list(IMAGES)
  assert read == [rows[number].clips.tolist() for number in range(len(read))]


def test_datasets_of_a_mixture_go_on_where_they_were_left(datasets):
  """Over two changes of weights, no dataset drops or repeats a row."""
  history = mixture.begin({"images": 1, "videos": 2})
  history = mixture.go_on(history, {"images": 3, "extra": 1}, 40)
  history = mixture.go_on(history, {"images": 0, "extra": 1, "videos": 5}, 72)
  loader = make_loader(datasets, history)
  placed = [loader.row(index) for index in range(160)]
  for name, rows in datasets.items():
    mine = [row.clips.tolist() for dataset, row in placed if dataset == name]
    assert mine == [rows[number].clips.tolist() for number in range(len(mine))]
  names = [placed.dataset for placed in placed]
  assert set(names[:40]) == {"images", "videos"} and set(names[40:72]) == {"images", "extra"}
  assert set(names[72:]) == {"videos", "extra"}
  assert names[40:72].count("images") == 24


def test_the_plan_says_what_the_rows_of_a_batch_hold(datasets):
  loader = make_loader(datasets)
  first = {"images": IMAGES[0], "videos": VIDEOS[0], "extra": EXTRA[0]}
  for k in (0, 4, 5, 125_000):
    batch = loader.batch(k)
    placed = [loader.row(index) for index in loader.rows_of(k)]
    assert numbers_of(batch) == [
      [first[name] + clip for clip in row.clips.tolist()] for name, row in placed
    ]
    assert loader.padding_fraction(k) == pytest.approx((batch.segment_ids == 0).mean())


def test_epochs_are_those_of_each_datasets_next_row(datasets):
  loader = make_loader(datasets)
  for k in (0, 3, 100):
    placed = [loader.row(index) for index in range(k * ROWS, k * ROWS + 16)]
    epochs = loader.epochs(k)
    for name in {placed.dataset for placed in placed}:
      assert epochs[name] == next(row.epoch for dataset, row in placed if dataset == name)
  assert make_loader(datasets).epochs(0) == {"images": 0, "videos": 0, "extra": 0}


def test_an_iterator_that_is_closed_leaves_no_thread(datasets):
  before = set(threading.enumerate())
  batches = make_loader(datasets).iterate()
  next(batches)
  assert set(threading.enumerate()) - before
  batches.close()
  for thread in set(threading.enumerate()) - before:
    thread.join(timeout=PATIENCE)
    assert not thread.is_alive()


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="only Linux says how much memory a process holds")
def test_memory_is_flat_over_ten_thousand_batches(datasets):
  def held() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

  batches = make_loader(datasets).iterate()
  next(itertools.islice(batches, 1000, None))
  before = held()
  next(itertools.islice(batches, 9000, None))
  assert held() - before < 2**24  # A leak of one row's tokens a batch would be 70 MB.
  batches.close()


def test_the_clips_of_a_batch_are_those_of_all_its_rows(datasets):
  loader = make_loader(datasets, mine=run_of(1, 2))
  rows = [loader.row(index) for index in range(3 * ROWS, 4 * ROWS)]
  wanted = [
    f"{name}: {datasets[name].dataset.source(clip)}"
    for name, row in rows
    for clip in row.clips.tolist()
  ]
  assert loader.clips(3) == wanted
  alone = Loader({"": datasets["images"]}, mixture.begin({"": 1}), rows=ROWS)
  assert set(alone.clips(0)) <= {datasets["images"].dataset.source(clip) for clip in range(90)}
