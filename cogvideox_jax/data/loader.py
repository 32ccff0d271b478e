"""The training input: this host's packed rows of batch k, for any k, read ahead by Grain.

Rows are numbered from 0. Batch k is rows [k * rows, (k + 1) * rows), of which a host reads those
that its devices hold. The mixture says which dataset a row comes from, and which row of it that is.
If batches are left out, the k-th batch that is taken has a larger number.
A batch may hold the end of one epoch and the start of the next. Everything is a function of (seed,
datasets, mixture, k). So a checkpoint needs only the step, and neither threads nor the number of
hosts change what is read.
"""

import os
import sys
from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

import grain

from cogvideox_jax.data import mixture, packing
from cogvideox_jax.data.left_out import StagePlan, everything
from cogvideox_jax.data.mixture import History
from cogvideox_jax.data.rows import Row, Rows
from cogvideox_jax.types import Batch


class TrainingRow(NamedTuple):
  """A row of the training, and the dataset that it comes from."""

  dataset: str
  row: Row


class Loader:
  """Batches of rows from one or more datasets."""

  def __init__(
    self,
    datasets: Mapping[str, Rows],  # By name. The rows of all have one length.
    history: History,  # It names these datasets, from the first row that is read on.
    *,
    rows: int,  # The number of rows in the global batch.
    mine: Sequence[int] | None = None,  # Which of them this host reads; None is all.
    plan: StagePlan | None = None,  # Which batches and clips are left out; None is nothing.
    num_threads: int = 4,
    prefetch_batches: int = 2,  # Batches to read ahead; 0 reads in the caller's thread.
  ):
    self._datasets, self._history, self._rows = datasets, history, rows
    self._mine = tuple(range(rows) if mine is None else mine)
    self._plan = plan or everything()
    self._num_threads, self._prefetch_batches = num_threads, prefetch_batches

  def batch(self, k: int) -> Batch:
    """Reads this host's rows of batch k."""
    return packing.stack([self._read(row) for row in self.rows_of(k)])

  def iterate(self, start: int = 0) -> Generator[Batch, None, None]:
    """Yields this host's rows of batch start, start + 1 and so on without end.

    Threads read ahead. Close the iterator (`.close()`, or let it go out of scope) to stop them.
    """
    buffer = self._prefetch_batches * len(self._mine)
    options = grain.ReadOptions(min(self._num_threads, buffer), buffer)
    rows = grain.MapDataset.source(_Source(self, start))
    batches = rows.to_iter_dataset(options).batch(len(self._mine), batch_fn=packing.stack)
    iterator = iter(batches)
    try:
      yield from iterator
    finally:
      iterator.close()

  def rows_of(self, k: int) -> list[int]:
    """Returns the numbers, in the whole training, of this host's rows of batch k."""
    return [self._plan.batch(k) * self._rows + row for row in self._mine]

  def all_rows_of(self, k: int) -> range:
    """Returns the numbers, in the whole training, of all rows of batch k."""
    first = self._plan.batch(k) * self._rows
    return range(first, first + self._rows)

  def row(self, index: int) -> TrainingRow:
    """Returns what row `index` of the training is made of. Reads no record."""
    name, number = mixture.locate(self._history, index)
    return TrainingRow(name, self._datasets[name].without(number, self._avoided(name, index)))

  def epochs(self, k: int) -> dict[str, int]:
    """Returns the epoch, from 0, that each dataset is in when batch k begins."""
    given = mixture.given(self._history, self._plan.batch(k) * self._rows)
    return {name: given.get(name, 0) // rows.per_epoch for name, rows in self._datasets.items()}

  def clips(self, k: int) -> list[str]:
    """Returns the names of the clips of the global batch k, after that of their dataset."""
    found = []
    for index in self.all_rows_of(k):
      name, row = self.row(index)
      source, prefix = self._datasets[name].dataset.source, self._prefix(name)
      found += [prefix + source(clip) for clip in row.clips.tolist()]
    return found

  def files(self, k: int) -> list[str]:
    """Returns the files that hold the clips of the global batch k."""
    rows = [self.row(index) for index in self.all_rows_of(k)]
    return sorted(
      {
        os.fspath(self._datasets[name].dataset.file(clip))
        for name, row in rows
        for clip in row.clips.tolist()
      }
    )

  def padding_fraction(self, k: int) -> float:
    """Returns the fraction of the tokens of the global batch k that are padding."""
    tokens = room = 0
    for index in self.all_rows_of(k):
      name, row = self.row(index)
      tokens += int(self._datasets[name].lengths[row.clips].sum())
      room += self._datasets[name].row_tokens
    return 1 - tokens / room

  def _read(self, index: int) -> Batch:
    name, row = self.row(index)
    return self._datasets[name].pack(row)

  def _prefix(self, dataset: str) -> str:
    """Returns what stands before the names of a dataset's clips."""
    return f"{dataset}: " if len(self._datasets) > 1 else ""

  def _avoided(self, dataset: str, index: int) -> frozenset[str]:
    """Returns the names, in their dataset, of the clips that a row is made without."""
    prefix = self._prefix(dataset)
    found = self._plan.avoided_in(index // self._rows)
    return frozenset(name.removeprefix(prefix) for name in found if name.startswith(prefix))


class _Source:
  """A host's rows from one batch on, as a source for Grain."""

  def __init__(self, loader: Loader, start: int):
    self._loader, self._start = loader, start

  def __len__(self) -> int:
    return sys.maxsize  # Without end.

  def __getitem__(self, index: int) -> Batch:
    batch, row = divmod(index, len(self._loader._mine))
    return self._loader._read(self._loader.rows_of(self._start + batch)[row])
