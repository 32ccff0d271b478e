"""Lets a job end on Ctrl-C or SIGTERM where it chooses, not in the middle of a step.

Python would raise KeyboardInterrupt in whatever line runs. Inside a callback from JAX that turns
into another error, or is lost.
"""

import signal
import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from cogvideox_jax.errors import INTERRUPTED, PREEMPTED

T = TypeVar("T")


class Interrupts:
  """While entered, records a signal instead of ending on it. A second Ctrl-C ends at once."""

  def __init__(self, promise: str = "Saving after this step.") -> None:
    """Takes a promise: what the first Ctrl-C prints that the job will do."""
    self.exit_code: int | None = None  # The code to exit with, once a signal came.
    self._promise = promise
    self._before: dict[signal.Signals, Any] = {}

  def __enter__(self) -> "Interrupts":
    for number in (signal.SIGINT, signal.SIGTERM):
      self._before[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def until(self, items: Iterable[T]) -> Iterator[T]:
    """Yields the items until a signal comes, for a job that has nothing to save.

    Raises:
      KeyboardInterrupt: Ctrl-C was pressed.
      SystemExit: SIGTERM came.
    """
    for item in items:
      if self.exit_code == INTERRUPTED:
        raise KeyboardInterrupt
      if self.exit_code is not None:
        raise SystemExit(self.exit_code)
      yield item

  def _receive(self, number: int, frame: FrameType | None) -> None:
    if number == signal.SIGTERM:
      self.exit_code = PREEMPTED
    elif self.exit_code is None:
      self.exit_code = INTERRUPTED
      print(f"\n{self._promise} Press Ctrl-C again to leave at once.", file=sys.stderr)
    else:
      raise KeyboardInterrupt
