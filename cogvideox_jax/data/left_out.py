"""Which batches and clips of the data a training leaves out, because they made steps bad."""

from typing import NamedTuple


class StagePlan(NamedTuple):
  """Where the batches of a stage come from. It may change while batches are read."""

  left_out: list[int]  # Batches of the data that are not taken, in rising order.
  avoided: dict[str, int]  # Clip -> the batch of the data from which on it is avoided.

  def batch(self, k: int) -> int:
    """Returns which batch of the data the stage's k-th batch is."""
    for one in self.left_out:
      k += one <= k
    return k

  def avoided_in(self, batch: int) -> frozenset[str]:
    """Returns the names of the clips that a batch of the data is made without."""
    avoided = tuple(self.avoided.items())  # At once, because another thread may add one.
    return frozenset(clip for clip, first in avoided if first <= batch)


def everything() -> StagePlan:
  """Returns the plan that leaves nothing out."""
  return StagePlan([], {})
