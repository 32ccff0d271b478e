"""The files that a run adds to: metrics.jsonl, events.jsonl and TensorBoard's."""

import json
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from cogvideox_jax.data.loader import Loader
from cogvideox_jax.errors import UserError

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
LONGEST_LINE = 1 << 20  # Bytes.

Measure = Callable[[], dict[str, float]]


class RunLog:
  """Writes a run's metrics and events, each line at once; of a job's processes only the first.

  A bucket cannot be appended to: for a workdir there, the files grow in a local folder and are
  copied by `upload`, which the loop calls at each checkpoint.
  """

  def __init__(self, workdir: epath.Path):
    self._workdir = workdir
    self._remote = "://" in os.fspath(workdir)
    self._folder = Path(tempfile.mkdtemp(prefix="run_log_") if self._remote else workdir)
    self._board = None
    if jax.process_index() == 0:
      for name in (METRICS, EVENTS):
        if self._remote and (workdir / name).exists():
          (self._folder / name).write_bytes((workdir / name).read_bytes())
        drop_torn_line(self._folder / name)
      self._board = SummaryWriter(str(self._folder / "tensorboard"))

  def metrics(self, step: int, values: dict[str, float], **labels: str) -> None:
    """Adds the object of one logged step, and its numbers to TensorBoard."""
    if self._board:
      append_line(self._folder / METRICS, {"step": step, **labels, **values})
      for name, value in values.items():
        self._board.add_scalar(name, value, step)
      self._board.flush()

  def event(self, name: str, **fields: Any) -> None:
    """Adds an object to events.jsonl. May be called from any thread."""
    if self._board:
      append_line(self._folder / EVENTS, {"event": name, **fields})

  def upload(self) -> None:
    """Copies the files to the bucket, where the workdir is one."""
    if self._board and self._remote:
      for file in self._folder.rglob("*"):
        if file.is_file():
          target = self._workdir / file.relative_to(self._folder).as_posix()
          target.parent.mkdir(parents=True, exist_ok=True)
          target.write_bytes(file.read_bytes())

  def close(self) -> None:
    """Copies the files a last time; nothing may be added after it."""
    if self._board:
      self._board.close()
      self.upload()


def append_line(path: Path, record: dict[str, Any]) -> None:
  """Adds one JSON object to a file, in one write: a killed process leaves at most one torn line."""
  line = json.dumps(record, allow_nan=False) + "\n"
  with path.open("ab", buffering=0) as file:
    file.write(line.encode())


def drop_torn_line(path: Path) -> None:
  """Cuts off the end of a last line that a killed process did not finish."""
  if not path.exists():
    return
  with path.open("rb+") as file:
    start = max(file.seek(0, os.SEEK_END) - LONGEST_LINE, 0)
    file.seek(start)
    file.truncate(start + file.read().rfind(b"\n") + 1)


class Recorder:
  """Turns what steps return into logged numbers, without holding up the device.

  Reading a number waits for its step, so it is done `lag` steps late.
  """

  def __init__(
    self,
    log: RunLog,
    loader: Loader,
    bar: tqdm,
    *,
    stage: str,
    first: int,  # The step that takes the loader's first batch.
    tokens: int,  # Of a global batch, padding included.
    every: int,  # A logged step stands for so many.
    lag: int,
  ):
    self._log, self._loader, self._bar = log, loader, bar
    self._stage, self._first = stage, first
    self._tokens, self._every, self._lag = tokens, every, lag
    self._waiting: deque[tuple[int, dict[str, jax.Array], Measure | None]] = deque()
    self._mark, self._seconds, self._steps = time.perf_counter(), 0.0, 0

  def add(self, step: int, metrics: dict[str, jax.Array], measure: Measure | None = None) -> None:
    """Takes a step's metrics.

    measure: called once the step is done, for numbers that make it a logged step whatever `every`.
    """
    self._waiting.append((step, metrics, measure))
    while len(self._waiting) > (0 if measure else self._lag):
      self._read(*self._waiting.popleft())

  def drain(self) -> None:
    """Reads what is waiting: after it, all steps so far are known to be finite."""
    while self._waiting:
      self._read(*self._waiting.popleft())

  def restart_clock(self) -> None:
    """Leaves out of the steps' time what was done since the last of them."""
    self._mark = time.perf_counter()

  def _read(self, step: int, metrics: dict[str, jax.Array], measure: Measure | None) -> None:
    values = {name: float(value) for name, value in metrics.items()}
    now = time.perf_counter()
    self._seconds, self._steps, self._mark = self._seconds + now - self._mark, self._steps + 1, now
    if odd := [name for name, value in values.items() if not math.isfinite(value)]:
      self._log.event("not_finite", step=step, metrics=odd)
      raise UserError(
        f"Training stopped at step {step}: {', '.join(odd)} not finite. Earlier checkpoints are "
        "intact.\nThe same command would meet it again. Train on from the newest of them in a new "
        "workdir, with\n--config.init_from=THIS_WORKDIR and a smaller "
        "config.optimizer.learning_rate, or look for odd numbers in the data."
      )
    self._bar.update()
    self._bar.set_postfix(loss=f"{values['loss']:.4f}")
    if step % self._every == 0 or measure:
      self._write(step, values, measure() if measure else {})
      self.restart_clock()

  def _write(self, step: int, values: dict[str, float], measured: dict[str, float]) -> None:
    batch = step - self._first
    padding = self._loader.padding_fraction(batch)
    seconds = self._seconds / self._steps
    self._seconds, self._steps = 0.0, 0
    numbers = {
      **values,
      "step_seconds": seconds,
      "tokens_per_second": self._tokens * (1 - padding) / seconds,
      "padding_fraction": padding,
      **_epochs(self._loader.epochs(batch)),
      **measured,
    }
    self._log.metrics(step, numbers, stage=self._stage)


def _epochs(by_dataset: dict[str, int]) -> dict[str, int]:
  """`epoch`, of the dataset that is repeated most; and of each, where there are several."""
  each = {f"epoch_{name}": epoch for name, epoch in by_dataset.items()}
  return {"epoch": max(by_dataset.values()), **(each if len(each) > 1 else {})}
