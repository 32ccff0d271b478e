"""What follows from steps that the guard skipped: events, clips to avoid, and going back."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from cogvideox_jax.errors import UserError
from cogvideox_jax.training.avoided import Avoided
from cogvideox_jax.training.guard import IN_A_ROW
from cogvideox_jax.training.metrics import EVENTS, Numbers, Report, RunLog

MOST_RETURNS = 3  # Times that a run goes back because of steps near one another; ours.


class GoBackError(Exception):
  """Says that too many steps in a row were skipped, so that the run must go back."""

  def __init__(self, first: int, last: int, report: Report):
    """Takes the first and the last of the skipped steps, and the report of their stage."""
    super().__init__(f"steps {first} to {last} were skipped")
    self.first, self.last, self.report = first, last, report


class BadSteps:
  """Judges the steps of a run one after the other, as their metrics are read."""

  def __init__(self, log: RunLog, avoided: Avoided, in_a_row: int, say: Callable[[str], None]):
    """in_a_row: after so many skipped steps in a row, the run goes back."""
    self.avoided = avoided
    self._log, self._in_a_row, self._say = log, in_a_row, say

  def judge(self, step: int, numbers: Numbers, report: Report) -> bool:
    """Takes a step's metrics, and returns whether the step was skipped.

    Raises:
      GoBackError: as many steps in a row were skipped as the config allows.
    """
    in_a_row, stage = int(numbers.pop(IN_A_ROW, 0)), report.stage
    if not in_a_row:
      if self.avoided.suspects(stage):
        self.avoided.acquit(stage, step, report.clips(step))
      return False
    self._log.event("step_skipped", **self._facts(step, numbers, report), in_a_row=in_a_row)
    for clip in self.avoided.accuse(stage, step, report.batch(step), report.clips(step)):
      self._log.event("clip_avoided", step=step, stage=stage, clip=clip)
      self._say(
        f"Clip {clip!r} made step {step} and those with it before bad: it is avoided from now on."
      )
    if in_a_row >= self._in_a_row:
      raise GoBackError(step - in_a_row + 1, step, report)
    return True

  def plan_return(self, bad: GoBackError, saved: Sequence[int]) -> int:
    """Takes batches out of the plan, and returns the step that the run goes back to.

    At first only the skipped batches are left out. If that does not help, the run goes back to an
    older checkpoint and leaves out everything from there on.

    Args:
      saved: the steps of the good checkpoints, oldest first.

    Raises:
      UserError: the run went back several times already and nothing helped, or there is nothing to
        go back to.
    """
    report = bad.report
    before = self.avoided.returns(report.stage, bad.first)
    # The beginning is gone back to only if nothing was saved, so that no checkpoint is lost.
    reachable = saved or ([0] if report.start == 0 else [])
    older = [step for step in reachable if report.start <= step < bad.first]
    if before:
      older = [step for step in older if step < min(before)] or older[:1]
    if len(before) >= MOST_RETURNS or not older:
      raise UserError(
        f"Training stopped at step {bad.last}: steps {bad.first} to {bad.last} were skipped, and "
        f"going back {len(before)} times did not help. {EVENTS} says why, and names their clips. "
        f"Earlier checkpoints are intact.\n{report.way_out}\n"
        "If these steps are as they should be: --config.guard.spike=0 skips only what is not "
        "finite."
      )
    first = older[-1] + 1 if before else bad.first
    batches = [report.batch(step) for step in range(first, bad.last + 1)]
    facts = {"step": bad.last, "stage": report.stage, "back_to": older[-1], "batches": batches}
    self._log.event("went_back", **facts)
    self.avoided.leave_out(**facts)
    self._say(
      f"Steps {bad.first} to {bad.last} were skipped: the run goes back to step {older[-1]} and "
      f"leaves out the {len(batches)} batches of steps {first} to {bad.last}."
    )
    return older[-1]

  def _facts(self, step: int, numbers: Numbers, report: Report) -> dict[str, Any]:
    """Returns what an event says about a skipped step."""
    odd = sorted(name for name, x in numbers.items() if not math.isfinite(x))
    return {
      "step": step,
      "stage": report.stage,
      "not_finite": odd,  # If it is empty, one of the numbers below was a spike.
      "metrics": {name: x for name, x in numbers.items() if math.isfinite(x)},
      "batch": report.batch(step),
      "clips": report.clips(step),
      **report.places(step),
    }
