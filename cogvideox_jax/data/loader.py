"""The training input: this host's packed rows of batch k, for any k, read ahead by Grain.

Rows are numbered from 0. Batch k is rows [k * rows, (k + 1) * rows), of which a host reads those
that its devices hold. The mixture says which dataset a row comes from, and which row of it that is.
A batch may hold the end of one epoch and the start of the next. Everything is a function of (seed,
datasets, mixture, k). So a checkpoint needs only the step, and neither threads nor the number of
hosts change what is read.
"""

import sys
from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

import grain

from cogvideox_jax.data import mixture, packing
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
    num_threads: int = 4,
    prefetch_batches: int = 2,  # Batches to read ahead; 0 reads in the caller's thread.
  ):
    self._datasets, self._history, self._rows = datasets, history, rows
    self._mine = tuple(range(rows) if mine is None else mine)
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
    return [k * self._rows + row for row in self._mine]

  def row(self, index: int) -> TrainingRow:
    """Returns what row `index` of the training is made of. Reads no record."""
    name, number = mixture.locate(self._history, index)
    return TrainingRow(name, self._datasets[name][number])

  def epochs(self, k: int) -> dict[str, int]:
    """Returns the epoch, from 0, that each dataset is in when batch k begins."""
    given = mixture.given(self._history, k * self._rows)
    return {name: given.get(name, 0) // rows.per_epoch for name, rows in self._datasets.items()}

  def clips(self, k: int) -> list[str]:
    """Returns the names of the clips of the global batch k, after that of their dataset."""
    found = []
    for index in range(k * self._rows, (k + 1) * self._rows):
      name, row = self.row(index)
      prefix = f"{name}: " if len(self._datasets) > 1 else ""
      source = self._datasets[name].dataset.source
      found += [prefix + source(clip) for clip in row.clips.tolist()]
    return found

  def padding_fraction(self, k: int) -> float:
    """Returns the fraction of the tokens of the global batch k that are padding."""
    tokens = room = 0
    for index in range(k * self._rows, (k + 1) * self._rows):
      name, row = self.row(index)
      tokens += int(self._datasets[name].lengths[row.clips].sum())
      room += self._datasets[name].row_tokens
    return 1 - tokens / room

  def _read(self, index: int) -> Batch:
    name, number = mixture.locate(self._history, index)
    return self._datasets[name].read(number)


class _Source:
  """A host's rows from one batch on, as a source for Grain."""

  def __init__(self, loader: Loader, start: int):
    self._loader, self._start = loader, start

  def __len__(self) -> int:
    return sys.maxsize  # Without end.

  def __getitem__(self, index: int) -> Batch:
    batch, row = divmod(index, len(self._loader._mine))
    return self._loader._read(self._loader.rows_of(self._start + batch)[row])
