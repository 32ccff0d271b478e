"""Ctrl-C and SIGTERM end a run after a save, not in the middle of a step."""

import signal
import sys
from types import FrameType
from typing import Any

from cogvideox_jax.errors import INTERRUPTED, PREEMPTED


class Interrupts:
  """While entered, remembers a signal instead of dying of it. A second Ctrl-C ends at once."""

  def __init__(self) -> None:
    self.exit_code: int | None = None  # What to leave with, once a signal came.
    self._before: dict[signal.Signals, Any] = {}

  def __enter__(self) -> "Interrupts":
    for number in (signal.SIGINT, signal.SIGTERM):
      self._before[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _receive(self, number: int, frame: FrameType | None) -> None:
    if number == signal.SIGTERM:
      self.exit_code = PREEMPTED
    elif self.exit_code is None:
      self.exit_code = INTERRUPTED
      print("\nSaving after this step. Press Ctrl-C again to leave at once.", file=sys.stderr)
    else:
      raise KeyboardInterrupt
