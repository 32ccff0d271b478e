"""Lets a job end on Ctrl-C, SIGTERM or SIGHUP where it chooses, not in the middle of a step.

Python would raise KeyboardInterrupt in whatever line runs. Inside a callback from JAX that turns
into another error, or is lost.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from cogvideox_jax.errors import INTERRUPTED, PREEMPTED

T = TypeVar("T")
STOPS = (signal.SIGTERM, signal.SIGHUP)  # The machine goes; the terminal went.
GRACE = 10.0  # Seconds that a command which has nothing to save may take to leave by itself.


def leave_on_signals() -> None:
  """Makes SIGTERM and SIGHUP end the process with PREEMPTED. Calling it again changes nothing.

  `Interrupts` takes over while there is something to save. A signal that was ignored, as SIGHUP is
  under nohup, stays ignored.
  """
  if signal.getsignal(signal.SIGTERM) == _leave:
    return
  for number in STOPS:
    if signal.getsignal(number) == signal.SIG_DFL:
      signal.signal(number, _leave)
  # Python runs handlers between two of its own lines, and one line may compile for minutes.
  read, write = os.pipe()
  os.set_blocking(write, False)
  signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  threading.Thread(target=_watch, args=(read,), name="signals", daemon=True).start()


def _leave(number: int, frame: FrameType | None) -> None:
  raise SystemExit(PREEMPTED)


def _watch(numbers: int) -> None:
  """Ends a process that does not leave by itself. Reads the numbers of the signals that come."""
  while number := os.read(numbers, 1):
    if number[0] in STOPS and signal.getsignal(number[0]) == _leave:
      timer = threading.Timer(GRACE, os._exit, [PREEMPTED])
      timer.daemon = True
      timer.start()


_records: list[list[int]] = []  # Those that `recorded` has given out.


@contextlib.contextmanager
def recorded() -> Iterator[list[int]]:
  """Gives a list to which each `Interrupts` adds the exit code of a signal that it records.

  A training whose last step is due when the signal comes ends with 0. A command that would go on
  with another training looks here whether it may.
  """
  codes: list[int] = []
  _records.append(codes)
  try:
    yield codes
  finally:
    _records[:] = [others for others in _records if others is not codes]


class Interrupts:
  """While entered, records a signal instead of ending on it. A second Ctrl-C ends at once."""

  def __init__(self, promise: str = "Saving after this step.") -> None:
    """Takes a promise: what the first Ctrl-C prints that the job will do."""
    self.exit_code: int | None = None  # The code to exit with, once a signal came.
    self._promise = promise
    self._before: dict[signal.Signals, Any] = {}

  def __enter__(self) -> "Interrupts":
    for number in (signal.SIGINT, *STOPS):
      if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
        self._before[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def until(self, items: Iterable[T]) -> Iterator[T]:
    """Yields the items until a signal comes, for a job that has nothing to save.

    Raises:
      KeyboardInterrupt: Ctrl-C was pressed.
      SystemExit: SIGTERM or SIGHUP came.
    """
    for item in items:
      if self.exit_code == INTERRUPTED:
        raise KeyboardInterrupt
      if self.exit_code is not None:
        raise SystemExit(self.exit_code)
      yield item

  def _receive(self, number: int, frame: FrameType | None) -> None:
    if number in STOPS:
      self.exit_code = PREEMPTED
    elif self.exit_code is None:
      self.exit_code = INTERRUPTED
      _say(f"\n{self._promise} Press Ctrl-C again to leave at once.\n")
    else:
      raise KeyboardInterrupt
    for codes in _records:
      codes.append(self.exit_code)


def _say(text: str) -> None:
  """Prints without Python's buffers, which the line that was interrupted may be writing to."""
  with contextlib.suppress(OSError):  # Nobody may be left to read it.
    os.write(2, text.encode())
