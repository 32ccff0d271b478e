"""The training input: this host's packed rows of batch k, for any k, read ahead by Grain.

Rows are numbered from 0 over all epochs; batch k is rows [k * rows, (k + 1) * rows), whose h-th
of H equal runs belongs to host h. A row belongs to one epoch; a batch may hold the end of one
and the start of the next. Everything is a function of (seed, dataset, k), so a checkpoint needs
no more than the step, and neither threads nor the number of hosts change what is read.
"""

import functools
import sys
import threading
from collections.abc import Generator, Sequence
from typing import Literal, NamedTuple

import grain
import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Int

from cogvideox_jax.data import packing
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.errors import UserError
from cogvideox_jax.types import Batch, Example


class Row(NamedTuple):
  """What a row is made of."""

  epoch: int
  clips: Int[np.ndarray, " clips"]  # Their numbers in the dataset, in the order of segments.


class Loader:
  """Batches of packed rows of one split of an encoded dataset."""

  def __init__(
    self,
    dataset: Dataset,
    *,
    rows: int,  # Of the global batch.
    row_tokens: int,
    max_clips: int,  # The most a row holds.
    patch: tuple[int, int, int],  # Latent frames, height, width.
    seed: int,
    drop: Literal["zeros"]
    | Float[np.ndarray, "l t"],  # A dropped caption: "zeros", or these text states.
    drop_rate: float,
    validation_fraction: float,  # Of the clips, in [0, 1]; chosen by a hash of their sources.
    split: str = "train",  # Or validation: the same order in every epoch and run, nothing dropped.
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    prefetch_batches: int = 2,  # Read ahead; 0 reads in the caller's thread.
  ):
    """UserError if the dataset or the batch does not fit these numbers."""
    if rows % process_count:
      raise UserError(f"a batch of {rows} rows cannot be shared equally by {process_count} hosts")
    self._dataset = dataset
    self._rows, self._row_tokens, self._max_clips = rows, row_tokens, max_clips
    self._patch, self._drop = patch, None if isinstance(drop, str) else drop
    self._local_rows = rows // process_count
    self._first_row = process_index * self._local_rows
    self._num_threads, self._prefetch_batches = num_threads, prefetch_batches
    self._shuffled = split == "train"
    self._seed, self._drop_rate = (seed, drop_rate) if self._shuffled else (0, 0.0)
    self._lengths = self._clip_lengths()  # Of all clips of the dataset.
    self._clips, self.unpackable = self._select(split, validation_fraction)
    lengths = self._lengths[self._clips]
    folder = dataset.directory / "plans"
    self._layout = packing.cached_layout(lengths, row_tokens, max_clips, folder)
    self._lock = threading.Lock()
    self._plan = functools.lru_cache(maxsize=2)(self._plan_epoch)

  @property
  def rows_per_epoch(self) -> int:
    return self._layout.num_rows

  def batch(self, k: int) -> Batch:
    """This host's rows of batch k."""
    start = k * self._local_rows
    return _stack([self._read(start + row) for row in range(self._local_rows)])

  def iterate(self, start: int = 0) -> Generator[Batch, None, None]:
    """This host's rows of batch start, start + 1 and so on without end, read ahead by threads.

    Close it (`.close()`, or let it go out of scope) to stop the threads.
    """
    buffer = self._prefetch_batches * self._local_rows
    options = grain.ReadOptions(min(self._num_threads, buffer), buffer)
    rows = grain.MapDataset.source(_Rows(self, start * self._local_rows))
    batches = rows.to_iter_dataset(options).batch(self._local_rows, batch_fn=_stack)
    iterator = iter(batches)
    try:
      yield from iterator
    finally:
      iterator.close()

  def row(self, index: int) -> Row:
    """The clips of global row `index`, from the plan alone."""
    number, place = divmod(index, self.rows_per_epoch)
    epoch, _ = self._epoch_plan(number)
    clips = epoch.clips[epoch.starts[place] : epoch.starts[place + 1]]
    return Row(number, self._clips[clips])

  def epoch(self, k: int) -> int:
    """The epoch, from 0, of the first row of batch k."""
    return k * self._rows // self.rows_per_epoch

  def padding_fraction(self, k: int) -> float:
    """Of the tokens of the global batch k."""
    rows = [self.row(k * self._rows + row).clips for row in range(self._rows)]
    tokens = sum(int(self._lengths[clips].sum()) for clips in rows)
    return 1 - tokens / (self._rows * self._row_tokens)

  def _clip_lengths(self) -> Int[np.ndarray, " clips"]:
    index, directory = self._dataset.index, self._dataset.directory
    if len(np.unique(index.text_shape, axis=0)) > 1:
      raise UserError(f"the clips of {directory} have text states of different sizes")
    text_shape = tuple(index.text_shape[0].tolist())
    if self._drop is not None and self._drop.shape != text_shape:
      raise UserError(
        f"an empty prompt is {self._drop.shape} numbers, but the captions of {directory} are\n"
        f"{text_shape}: encode the clips again with the text encoder of this config"
      )
    latents = index.latent_shape[:, :3]
    if (odd := (latents % np.array(self._patch)).any(axis=1)).any():
      clip = int(np.argmax(odd))
      raise UserError(
        f"{self._dataset.source(clip)!r} in {directory} has (f, h, w) latents\n"
        f"{tuple(latents[clip].tolist())}, which patches of {self._patch} do not divide:\n"
        "encode it at sizes and durations that they do"
      )
    return packing.clip_tokens(latents, patch=self._patch, text_length=text_shape[0])

  def _select(
    self, split: str, validation_fraction: float
  ) -> tuple[Int[np.ndarray, " clips"], Int[np.ndarray, " too_long"]]:
    """The split's clips that fit a row, and those that do not."""
    held_out = self._dataset.index.source_hash < validation_fraction * 2.0**64
    chosen = held_out if split == "validation" else ~held_out
    fits = self._lengths <= self._row_tokens
    clips, too_long = np.flatnonzero(chosen & fits), np.flatnonzero(chosen & ~fits)
    directory = self._dataset.directory
    if not chosen.any():
      raise UserError(
        f"none of the {len(chosen)} clips of {directory} is in the {split} split:\n"
        f"change config.data.validation_fraction, which is {validation_fraction}"
      )
    if not len(clips):
      raise UserError(
        f"none of the {split} clips of {directory} fits a row of {self._row_tokens} tokens; the\n"
        f"shortest has {self._lengths[chosen].min()}: raise row_tokens or encode smaller clips"
      )
    if len(too_long):
      logging.warning(
        "%d of %d %s clips are longer than a row of %d tokens and are left out, the first is %r",
        len(too_long),
        chosen.sum(),
        split,
        self._row_tokens,
        self._dataset.source(int(too_long[0])),
      )
    return clips, too_long

  def _epoch_plan(self, number: int) -> tuple[packing.Epoch, Bool[np.ndarray, " clips"]]:
    """An epoch's rows, and which clips of the dataset lose their caption in it."""
    with self._lock:  # So that threads which meet a new epoch do not each plan it.
      return self._plan(number if self._shuffled else 0)

  def _plan_epoch(self, number: int) -> tuple[packing.Epoch, Bool[np.ndarray, " clips"]]:
    lengths = self._lengths[self._clips]
    epoch = packing.plan_epoch(self._layout, lengths, self._seed, number)
    return epoch, packing.dropped(self._drop_rate, len(self._dataset), self._seed, number)

  def _read(self, local: int) -> Batch:
    """The local-th of this host's rows."""
    batch, row = divmod(local, self._local_rows)
    number, clips = self.row(batch * self._rows + self._first_row + row)
    _, dropped = self._epoch_plan(number)
    return packing.pack(
      [self._example(int(clip), drop=bool(dropped[clip])) for clip in clips],
      patch=self._patch,
      row_tokens=self._row_tokens,
      max_clips=self._max_clips,
    )

  def _example(self, clip: int, *, drop: bool) -> Example:
    example = self._dataset[clip]
    if not drop:
      return example
    return example._replace(text=np.zeros_like(example.text) if self._drop is None else self._drop)


class _Rows:
  """A host's rows from the first on, as a source for Grain."""

  def __init__(self, loader: Loader, first: int):
    self._loader, self._first = loader, first

  def __len__(self) -> int:
    return sys.maxsize  # Without end.

  def __getitem__(self, index: int) -> Batch:
    return self._loader._read(self._first + index)


def _stack(rows: Sequence[Batch]) -> Batch:
  return Batch(*map(np.concatenate, zip(*rows, strict=True)))
