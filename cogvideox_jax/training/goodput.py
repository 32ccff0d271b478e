"""What became of a run's wall time: WORKDIR/timeline.jsonl, and the shares that follow from it.

A line for each start says when, where and with which versions. Lines of notes say how long the
training has done what since its start. There is one at each save, at the end, and at least every
minute, so a killed process leaves at most a minute unnoted.
"""

import json
import platform
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from etils import epath

from cogvideox_jax.errors import UserError
from cogvideox_jax.training.metrics import TIMELINE, RunLog
from cogvideox_jax.training.phases import START, STEP, Phases
from cogvideox_jax.version import __version__

EVERY = 60.0  # Seconds from note to note, at most.
# Shares besides those of the phases: steps that were taken again, and the time between a process
# and the next.
LOST, DOWN = "lost work", "down"
NAMES = {STEP: "useful steps", START: "restart", "data": "data wait"}

Line = dict[str, Any]


class Timeline:
  """Writes the timeline of one start."""

  def __init__(self, log: RunLog, phases: Phases):
    self._log, self._phases = log, phases
    self._noted = time.monotonic()

  def begin(self, step: int) -> None:
    """Notes that a process goes on from a step, with all that its speed depends on."""
    device = jax.devices()[0]
    self._log.line(
      TIMELINE,
      {
        "time": time.time(),
        "from_step": step,
        "host": socket.gethostname(),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "device": device.device_kind,
        "version": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "seconds": self._phases.so_far(),
      },
    )

  def note(self, step: int, *, now: bool = False) -> None:
    """Notes the times so far, if a minute is over or it is to be now.

    Args:
      step: the last step that was begun.
    """
    if now or time.monotonic() - self._noted > EVERY:
      self._noted = time.monotonic()
      seconds = self._phases.so_far()
      self._log.line(TIMELINE, {"time": time.time(), "step": step, "seconds": seconds})

  def summary(self) -> str:
    """Says what became of the wall time of this start, in one line."""
    return describe(self._phases.so_far())


def describe(seconds: Mapping[str, float]) -> str:
  """Returns the shares of some times as text, the largest first."""
  total = sum(seconds.values()) or 1.0
  ordered = sorted(seconds.items(), key=lambda item: -item[1])
  shares = ", ".join(f"{x / total:.1%} {NAMES.get(name, name)}" for name, x in ordered if x > 0)
  return f"{total:.0f} s: {shares}"


def read(workdir: epath.Path) -> list[Line]:
  """Returns the timeline of a run; a UserError if it has none."""
  path = workdir / TIMELINE
  if not path.exists():
    raise UserError(
      f"There is no {path}.\nGive the workdir of a training that this version has taken steps in."
    )
  return [json.loads(text) for text in path.read_text().splitlines() if text.endswith("}")]


def wall_time(lines: Iterable[Line]) -> dict[str, float]:
  """Returns the seconds that a run spent on what, over all its starts; they sum to its wall time.

  Steps that a later start takes again are lost work, and so is what a process did after its last
  note, as far as that is known: it counts as down, with the time until the next start.
  """
  found: dict[str, float] = {DOWN: 0.0, LOST: 0.0}
  starts: list[list[Line]] = []
  for line in lines:
    if "from_step" in line:
      starts.append([])
    starts[-1].append(line)
  before: Line = {"seconds": {}}
  for number, notes in enumerate(starts):
    first, last = notes[0], notes[-1]
    # A process that went back goes on adding to its times; a new one begins at 0.
    is_new = _total(first) < _total(before)
    if is_new:
      found[DOWN] += max(first["time"] - _total(first) - before["time"], 0.0)
    known = {} if is_new else before["seconds"]
    for name, x in last["seconds"].items():
      found[name] = found.get(name, 0.0) + x - known.get(name, 0.0)
    if number + 1 < len(starts):
      lost = _steps_after(notes, starts[number + 1][0]["from_step"])
      found[STEP] = found.get(STEP, 0.0) - lost
      found[LOST] += lost
    before = last
  return found


def _total(line: Line) -> float:
  return float(sum(line["seconds"].values()))


def _steps_after(notes: list[Line], step: int) -> float:
  """Returns the seconds that the steps after `step` took, by the notes of one start."""
  kept = [line for line in notes if line.get("step", line.get("from_step", 0)) <= step]
  reached = kept[-1] if kept else notes[0]
  return notes[-1]["seconds"].get(STEP, 0.0) - reached["seconds"].get(STEP, 0.0)
