"""Writes what a run logs: metrics.jsonl, events.jsonl and TensorBoard's files."""

import json
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from cogvideox_jax.errors import UserError

METRICS, EVENTS, TIMELINE = "metrics.jsonl", "events.jsonl", "timeline.jsonl"
LINE_BYTES = 1 << 20  # No line is longer.

Numbers = dict[str, int | float]  # By name.
Measure = Callable[[], Numbers]


class RunLog:
  """Writes a run's metrics and events, each line at once. Only the first process of a job writes.

  Files in a bucket cannot be appended to. If the workdir is in one, the files grow in a local
  folder, and `upload` copies them, which the session calls at each checkpoint.
  """

  def __init__(self, workdir: epath.Path):
    self._workdir = workdir
    self._remote = "://" in os.fspath(workdir)
    self._folder = Path(tempfile.mkdtemp(prefix="run_log_") if self._remote else workdir)
    self._board = None
    if jax.process_index() == 0:
      for name in (METRICS, EVENTS, TIMELINE):
        if self._remote and (workdir / name).exists():
          (self._folder / name).write_bytes((workdir / name).read_bytes())
        drop_torn_line(self._folder / name)
      self._board = SummaryWriter(str(self._folder / "tensorboard"))

  def metrics(self, step: int, numbers: Numbers, **labels: str) -> None:
    """Adds the numbers of one logged step to metrics.jsonl and TensorBoard.

    Args:
      labels: texts that stand in the line beside the numbers.
    """
    if self._board:
      append_line(self._folder / METRICS, {"step": step, **labels, **numbers})
      for name, x in numbers.items():
        self._board.add_scalar(name, x, step)
      self._board.flush()

  def event(self, name: str, **fields: Any) -> None:
    """Adds an object to events.jsonl. May be called from any thread."""
    if self._board:
      append_line(self._folder / EVENTS, {"event": name, **fields})

  def line(self, file: str, record: dict[str, Any]) -> None:
    """Adds an object to a file of the workdir, one of JSON lines."""
    if self._board:
      append_line(self._folder / file, record)

  def upload(self) -> None:
    """Copies the files to the workdir if that is in a bucket."""
    if self._board and self._remote:
      for file in self._folder.rglob("*"):
        if file.is_file():
          target = self._workdir / file.relative_to(self._folder).as_posix()
          target.parent.mkdir(parents=True, exist_ok=True)
          target.write_bytes(file.read_bytes())

  def close(self) -> None:
    """Copies the files a last time. Nothing may be added afterwards."""
    if self._board:
      self._board.close()
      self.upload()


def append_line(path: Path, record: dict[str, Any]) -> None:
  """Adds a JSON object to a file in one write, so that a killed process leaves one torn line."""
  line = json.dumps(record, allow_nan=False) + "\n"
  with path.open("ab", buffering=0) as file:
    file.write(line.encode())


def drop_torn_line(path: Path) -> None:
  """Cuts off the end of a last line that a killed process did not finish."""
  if not path.exists():
    return
  with path.open("rb+") as file:
    start = max(file.seek(0, os.SEEK_END) - LINE_BYTES, 0)
    file.seek(start)
    file.truncate(start + file.read().rfind(b"\n") + 1)


def _nothing(step: int, seconds: float) -> Numbers:
  return {}


class Report(NamedTuple):
  """What a training reports about its steps."""

  name: str  # The title of the progress bar.
  steps: int  # Steps of the whole training.
  shown: tuple[str, ...]  # Names of the metrics that the progress bar shows.
  log_every: int  # Steps from one logged step to the next.
  way_out: str  # What to do if a metric is not finite, as the end of a message.
  describe: Callable[[int, float], Numbers] = _nothing  # (step, its seconds) -> numbers to log.
  labels: dict[str, str] = {}  # Texts that stand in each line of the log.
  clips: Callable[[int], list[str]] = lambda step: []  # The names of the clips of a step's batch.
  batch: Callable[[int], int] = lambda step: step - 1  # Which batch of the data a step takes.
  # The rows of a step's batch and the files that hold its clips, for events.
  places: Callable[[int], dict[str, Any]] = lambda step: {}
  stage: str = ""  # The stage that the steps belong to, and
  start: int = 0  # the steps before it.


# Takes a step, its metrics and the report, and returns whether the step was skipped.
Judge = Callable[[int, Numbers, Report], bool]


class Recorder:
  """Logs the metrics that steps return, without holding up the device.

  Reading a metric waits for its step, so it is read `lag` steps later.
  """

  def __init__(
    self,
    log: RunLog,
    bar: tqdm,
    report: Report,
    *,
    lag: int,
    judge: Judge = lambda step, numbers, report: False,
  ):
    self.skipping = False  # Whether the step that was read last was skipped.
    self._log, self._bar, self._report, self._lag = log, bar, report, lag
    self._judge = judge
    self._waiting: deque[tuple[int, dict[str, jax.Array], Measure | None]] = deque()
    self._mark, self._seconds, self._steps = time.perf_counter(), 0.0, 0

  def add(self, step: int, metrics: dict[str, jax.Array], measure: Measure | None = None) -> None:
    """Takes a step's metrics.

    Args:
      measure: called once the step is done, for more numbers. A step with it is always logged.
    """
    self._waiting.append((step, metrics, measure))
    while len(self._waiting) > (0 if measure else self._lag):
      self._read(*self._waiting.popleft())

  def drain(self) -> None:
    """Reads all metrics that are waiting, so that all steps so far are known to be finite."""
    while self._waiting:
      self._read(*self._waiting.popleft())

  def restart_clock(self) -> None:
    """Excludes what was done since the last step from the time of steps."""
    self._mark = time.perf_counter()

  def _read(self, step: int, metrics: dict[str, jax.Array], measure: Measure | None) -> None:
    numbers = {name: float(x) for name, x in metrics.items()}
    now = time.perf_counter()
    self._seconds, self._steps, self._mark = self._seconds + now - self._mark, self._steps + 1, now
    self.skipping = self._judge(step, numbers, self._report)
    if self.skipping:
      numbers = {name: x for name, x in numbers.items() if math.isfinite(x)}
    self._check_finite(step, numbers)
    self._bar.update()
    self._bar.set_postfix(
      {name: f"{numbers.get(name, math.nan):.4f}" for name in self._report.shown}
    )
    if step % self._report.log_every == 0 or measure:
      self._write(step, numbers, measure() if measure else {})
      self.restart_clock()

  def _check_finite(self, step: int, numbers: Numbers) -> None:
    if odd := [name for name, x in numbers.items() if not math.isfinite(x)]:
      clips = self._report.clips(step)
      self._log.event("not_finite", step=step, metrics=odd, **({"clips": clips} if clips else {}))
      where = f"\n{EVENTS} names the {len(clips)} clips of its batch." if clips else ""
      raise UserError(
        f"Training stopped at step {step}: {', '.join(odd)} not finite. Earlier checkpoints are "
        f"intact.{where}\nThe same command would meet it again. {self._report.way_out}"
      )

  def _write(self, step: int, numbers: Numbers, measured: Numbers) -> None:
    seconds = self._seconds / self._steps
    self._seconds, self._steps = 0.0, 0
    described = self._report.describe(step, seconds)
    line = {**numbers, "step_seconds": seconds, **described, **measured}
    self._log.metrics(step, line, **self._report.labels)
