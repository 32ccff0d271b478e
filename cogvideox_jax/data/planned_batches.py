"""Batches of decoded clips without those that a training leaves out."""

from collections.abc import Generator

import numpy as np
from jaxtyping import UInt8

from cogvideox_jax.data.clip_batches import BatchSize, ClipBatches, RowsOf
from cogvideox_jax.data.clip_reading import Reading, read_ahead
from cogvideox_jax.data.interleaved_batches import InterleavedBatches
from cogvideox_jax.data.left_out import StagePlan


class PlannedBatches:
  """The batches that a stage takes: its k-th batch is the k-th that is not left out."""

  def __init__(self, batches: ClipBatches | InterleavedBatches, plan: StagePlan):
    self._batches, self._plan = batches, plan

  def number(self, k: int) -> int:
    """Returns which of all batches batch k is."""
    return self._plan.batch(k)

  def epoch(self, k: int) -> int:
    """As `ClipBatches.epoch`."""
    return self._batches.epoch(self.number(k))

  def sizes_of(self, k: int) -> BatchSize:
    """As `ClipBatches.sizes_of`."""
    return self._batches.sizes_of(self.number(k))

  def clips(self, k: int) -> list[str]:
    """As `ClipBatches.clips`, without the names of those that are avoided."""
    avoided = self._plan.avoided_in(self.number(k))
    return [name for name in self._batches.clips(self.number(k)) if name not in avoided]

  def iterate(
    self, start: int = 0, rows: RowsOf | None = None
  ) -> Generator[UInt8[np.ndarray, "b F H W 3"], None, None]:
    """As `ClipBatches.iterate`."""

    def begin(k: int) -> Reading:
      number = self.number(k)
      return self._batches.start(number, rows, self._plan.avoided_in(number))

    return read_ahead(begin, start)
