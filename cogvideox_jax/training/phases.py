"""What a training is doing, for how long it has, and whether it hangs.

The driver of steps says what comes next. The times add up to the shares of a run's wall time. A
watchdog ends the process if one thing takes longer than the config allows.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from cogvideox_jax.errors import HUNG

# What a training does. Restoring, making programs and all else before the first step is START.
START, COMPILE, DATA, STEP, SAVE, MEASURE = (
  "start",
  "compile",
  "data",
  "step",
  "save",
  "validate",
)
_WAITS = {
  START: "the start: reading the workdir and the data, or another process of the job",
  COMPILE: "the compiler",
  DATA: "data: the next batch is not there",
  STEP: "the device, or another process of the job: a step is not done",
  SAVE: "a save: the disk or the bucket that holds the workdir does not answer",
  MEASURE: "validation or previews: the device, or another process of the job",
}


class Phases:
  """Adds up how long a training did what; while entered, ends the process if something hangs."""

  def __init__(
    self,
    limit: float,
    *,
    on_hang: Callable[..., None] = lambda **facts: None,
    others: Callable[[], list[str]] = list,
    tell: Callable[[str], None] = lambda text: None,
    leave: Callable[[int], Any] = os._exit,
  ):
    """Begins with START.

    Args:
      limit: seconds after which something hangs; 0: nothing ever does.
      on_hang: takes facts about what hangs, for the log.
      others: describes what the other processes do.
      tell: takes what this process does, for the others.
    """
    self.seconds: dict[str, float] = {}  # How long each thing took so far.
    self._limit, self._on_hang, self._others = limit, on_hang, others
    self._tell, self._leave = tell, leave
    self._now, self._step, self._since = START, 0, time.monotonic()
    self._main = threading.get_ident()
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

  def __enter__(self) -> "Phases":
    if self._limit:
      self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._ended.set()
    self.enter(self._now, self._step)

  def enter(self, phase: str, step: int) -> None:
    """Says that from now on the training does this.

    Args:
      step: the step that is under way.
    """
    now = time.monotonic()
    self.seconds[self._now] = self.seconds.get(self._now, 0.0) + now - self._since
    self._now, self._step, self._since = phase, step, now
    self._tell(f"in step {step} ({phase})")

  def so_far(self) -> dict[str, float]:
    """Returns the seconds that each thing took, what is under way included."""
    own = time.monotonic() - self._since
    return {**self.seconds, self._now: self.seconds.get(self._now, 0.0) + own}

  def _watch(self) -> None:
    while not self._ended.wait(min(self._limit / 10, 5.0)):
      phase, since = self._now, self._since
      if time.monotonic() - since > self._limit and (phase, since) == (self._now, self._since):
        self._end(phase)
        return

  def _end(self, phase: str) -> None:
    """Says what hangs, with the stacks of all threads, and ends the process."""
    sys.stdout.flush()
    others = self._others()
    lines = [
      f"Step {self._step} has made no progress for {self._limit:g} s.",
      f"It waits for {_WAITS[phase]}.",
      *others,
      "The stack of each thread, of this one last:",
    ]
    print(*lines, sep="\n", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
    print(
      "This process ends. The same command goes on from what was saved last. If nothing hung, "
      "raise config.watchdog.seconds.",
      file=sys.stderr,
      flush=True,
    )
    # A log that hangs as well, such as that of a mount which is gone, must not keep the process.
    timer = threading.Timer(5.0, self._leave, [HUNG])
    timer.daemon = True
    timer.start()
    self._on_hang(step=self._step, waits_for=phase, seconds=self._limit, others=others)
    self._leave(HUNG)
