"""What a run leaves out because it made steps bad. It is part of the plan of the data.

WORKDIR/avoid.jsonl has a line for each clip that is avoided and for each run of batches that was
left out. WORKDIR/suspects.jsonl has the judgements that lead there: a clip whose batch was skipped
is suspected, and acquitted by a batch with it that is not. Both files follow from the steps alone,
so they are the same for any number of hosts, and a run that was killed makes the same ones again.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from cogvideox_jax import hosts
from cogvideox_jax.data.files import write_atomically
from cogvideox_jax.data.left_out import StagePlan, everything
from cogvideox_jax.errors import UserError

AVOID, SUSPECTS = "avoid.jsonl", "suspects.jsonl"
STRIKES = 3  # Bad batches of a clip, none good between them, after which it is avoided; ours.
# A clip is avoided from so many batches after the one that decided it on. It is more than is ever
# read ahead, so that where it begins does not depend on how far that was.
DELAY = 64

Line = dict[str, Any]


class Avoided:
  """The plans of all stages of a run, and the clips that are suspected."""

  def __init__(self, workdir: epath.Path):
    """Reads the files of a workdir; raises a UserError if one is damaged."""
    self._workdir = workdir
    self._lines = {name: _read(workdir / name) for name in (AVOID, SUSPECTS)}
    self._plans: dict[str, StagePlan] = {}
    self._strikes: dict[str, dict[str, int]] = {}
    for line in self._lines[AVOID]:
      self._plan(line)

  def stage(self, name: str) -> StagePlan:
    """Returns the plan of a stage; later changes show in it."""
    return self._plans.setdefault(name, everything())

  def resume(self, step: int) -> None:
    """Forgets what was judged of steps after the one that the run goes on from."""
    kept = [line for line in self._lines[SUSPECTS] if line["step"] <= step]
    changed, self._lines[SUSPECTS] = len(kept) != len(self._lines[SUSPECTS]), kept
    self._strikes = {}
    for line in kept:
      self._judge(line)
    if changed:
      self._write(SUSPECTS)

  def suspects(self, stage: str) -> Mapping[str, int]:
    """Returns how many batches of each suspected clip were bad."""
    return self._strikes.get(stage, {})

  def accuse(self, stage: str, step: int, batch: int, clips: Iterable[str]) -> list[str]:
    """Notes that a batch was bad, and returns which of its clips are avoided from now on."""
    line = {"step": step, "stage": stage, "batch": batch, "skipped_with": sorted(set(clips))}
    self._judge(line)
    self._add(SUSPECTS, line)
    known, found = self.stage(stage).avoided, []
    for clip in line["skipped_with"]:
      if self._strikes[stage][clip] >= STRIKES and clip not in known:
        found.append(clip)
        line = {"clip": clip, "stage": stage, "from_batch": batch + DELAY, "step": step}
        self._plan(line)
        self._add(AVOID, line)
    return found

  def acquit(self, stage: str, step: int, clips: Iterable[str]) -> None:
    """Notes that a batch was good, so that its clips are not to blame."""
    if cleared := sorted(self.suspects(stage).keys() & set(clips)):
      line = {"step": step, "stage": stage, "acquitted": cleared}
      self._judge(line)
      self._add(SUSPECTS, line)

  def returns(self, stage: str, step: int) -> list[int]:
    """Returns the steps to which the run went back because of steps near this one."""
    return [
      line["back_to"]
      for line in self._lines[AVOID]
      if "back_to" in line and line["stage"] == stage and line["step"] + DELAY >= step
    ]

  def leave_out(self, stage: str, batches: list[int], step: int, back_to: int) -> None:
    """Takes batches of the data out of the plan, because the run goes back from a step."""
    line = {"batches": batches, "stage": stage, "step": step, "back_to": back_to}
    self._plan(line)
    self._add(AVOID, line)

  def _plan(self, line: Line) -> None:
    plan = self.stage(line["stage"])
    if "clip" in line:
      plan.avoided.setdefault(line["clip"], line["from_batch"])
    else:
      plan.left_out[:] = sorted({*plan.left_out, *line["batches"]})

  def _judge(self, line: Line) -> None:
    strikes = self._strikes.setdefault(line["stage"], {})
    for clip in line.get("skipped_with", ()):
      strikes[clip] = strikes.get(clip, 0) + 1
    for clip in line.get("acquitted", ()):
      strikes.pop(clip, None)

  def _add(self, name: str, line: Line) -> None:
    self._lines[name].append(line)
    self._write(name)

  def _write(self, name: str) -> None:
    """Writes a whole file, because in a bucket nothing can be added to one."""
    if hosts.is_first():
      text = "".join(json.dumps(line) + "\n" for line in self._lines[name])
      write_atomically(self._workdir / name, text.encode())


def _read(path: epath.Path) -> list[Line]:
  """Returns the lines that the first process finds, in every process."""
  text = path.read_text() if hosts.is_first() and path.exists() else ""
  try:
    return [json.loads(line) for line in hosts.each(text)[0].splitlines()]
  except ValueError as error:
    raise UserError(
      f"{path} is damaged ({error}).\nRestore it: it says which clips the run leaves out."
    ) from error
