"""The files that a run adds to: metrics.jsonl, events.jsonl and TensorBoard's."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from etils import epath
from tensorboardX import SummaryWriter

LONGEST_LINE = 1 << 20  # Bytes.


class RunLog:
  """Writes a run's metrics and events, each line at once; process 0 holds the only one.

  A bucket cannot be appended to: for a workdir there, the files grow in a local folder and are
  copied by `upload`, which the loop calls at each checkpoint.
  """

  def __init__(self, workdir: epath.Path):
    self._workdir = workdir
    self._remote = "://" in os.fspath(workdir)
    self._folder = Path(tempfile.mkdtemp(prefix="run_log_") if self._remote else workdir)
    for name in ("metrics.jsonl", "events.jsonl"):
      if self._remote and (workdir / name).exists():
        (self._folder / name).write_bytes((workdir / name).read_bytes())
      drop_torn_line(self._folder / name)
    self._board = SummaryWriter(str(self._folder / "tensorboard"))

  def metrics(self, step: int, values: dict[str, float]) -> None:
    """Adds the object of one logged step, and the same numbers to TensorBoard."""
    append_line(self._folder / "metrics.jsonl", {"step": step, **values})
    for name, value in values.items():
      self._board.add_scalar(name, value, step)
    self._board.flush()

  def event(self, name: str, **fields: Any) -> None:
    """Adds an object to events.jsonl. May be called from any thread."""
    append_line(self._folder / "events.jsonl", {"event": name, **fields})

  def upload(self) -> None:
    """Copies the files to the bucket, where the workdir is one."""
    if self._remote:
      for file in self._folder.rglob("*"):
        if file.is_file():
          target = self._workdir / file.relative_to(self._folder).as_posix()
          target.parent.mkdir(parents=True, exist_ok=True)
          target.write_bytes(file.read_bytes())

  def close(self) -> None:
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
