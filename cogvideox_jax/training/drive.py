"""Takes the steps of any training.

The driver is given batches, a step, and things that happen every so many steps. It reads batches
ahead, reads metrics late so that the device never waits for the host, saves only states that are
known to be finite, notices failed saves, stops on request, and keeps clocks and progress.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
from tqdm import tqdm

from cogvideox_jax import hosts
from cogvideox_jax.training.bad_steps import GoBackError
from cogvideox_jax.training.metrics import Numbers, Recorder, Report
from cogvideox_jax.training.phases import DATA, MEASURE, SAVE, STEP, Phases
from cogvideox_jax.training.session import Session
from cogvideox_jax.training.state import TrainState

READ_AHEAD = 2  # Batches that are put on the devices before their step.

T = TypeVar("T")
Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


class Every(NamedTuple):
  """Something that happens once in so many steps, in every process of a job."""

  steps: int  # 0: never.
  do: Callable[[int, TrainState], Numbers | None]  # Takes a step's number and the state after it.
  measures: bool = False  # Whether it returns numbers, which join the step's line of the log.


def take_steps(
  state: TrainState,
  batches: Iterator[Any],
  take_step: Step,
  session: Session,
  report: Report,
  *,
  last: int,
  save_every: int,
  happenings: Sequence[Every] = (),
) -> TrainState:
  """Takes steps from the state's to `last`, or until a signal comes.

  At each step the happenings that measure come first, then a save if one is due, then the others,
  each in the order given.

  Args:
    batches: batches on the mesh, as `read_ahead` yields them, from that of the next step.
    take_step: (state, batch) -> (state, metrics); it may reuse the buffers of the state.
    last: the step to stop after, which is saved.
    save_every: steps from one save to the next; 0: only the last is saved.

  Returns:
    The state after the last step taken. It is saved, or its save is under way.

  Raises:
    UserError: a metric is not finite, or a checkpoint could not be written.
    GoBackError: so many steps in a row were skipped that the run must go back
      (`Session.go_back`). The state's arrays are deleted.
  """
  begun = int(state.step)
  with tqdm(
    desc=report.name, initial=begun, total=report.steps, disable=not hosts.is_first()
  ) as bar:
    # Metrics need not be read late if the loop waits for each step.
    lag = 0 if session.waits else READ_AHEAD
    recorder = Recorder(session.log, bar, report, lag=lag, judge=session.bad_steps.judge)
    try:
      for step, batch in _awaited(batches, begun + 1, session.phases):
        session.stopping.ask()
        state, metrics = take_step(state, batch)
        if session.waits:
          jax.block_until_ready(state)
        due = [one for one in happenings if is_due(step, one.steps)]
        measures = [one.do for one in due if one.measures]
        recorder.add(
          step,
          metrics,
          partial(_measure, measures, step, state, session.phases) if measures else None,
        )
        stops = session.stopping.is_due() or step == last
        if stops or is_due(step, save_every):
          recorder.drain()  # Checks that all metrics are finite before the state is saved.
          # A run that goes back must find a checkpoint of before the steps that were skipped.
          if stops or not recorder.skipping:
            session.phases.enter(SAVE, step)
            session.timeline.note(step, now=True)
            session.checkpoints.save(step, state)
        for one in due:
          if not one.measures:
            session.phases.enter(MEASURE, step)
            one.do(step, state)
        session.checkpoints.check()
        if stops:
          break
        session.timeline.note(step)
        recorder.restart_clock()
    except GoBackError:
      # An error keeps this frame, and so the state, while another one is restored.
      for array in jax.tree.leaves(state.saved()):
        array.delete()
      raise
  return state


def read_ahead(batches: Iterator[T], put: Callable[[T], Any]) -> Iterator[Any]:
  """Yields batches on the mesh, and puts READ_AHEAD more of them there in advance.

  Args:
    put: takes a batch of host arrays and returns it on the mesh.
  """
  waiting: deque[Any] = deque()
  for batch in batches:
    waiting.append(put(batch))
    if len(waiting) > READ_AHEAD:
      yield waiting.popleft()
  yield from waiting


def _awaited(batches: Iterator[T], first: int, phases: Phases) -> Iterator[tuple[int, T]]:
  """Yields the batches with the numbers of their steps, and says when they are waited for."""
  for step in itertools.count(first):
    phases.enter(DATA, step)
    try:
      batch = next(batches)
    except StopIteration:
      return
    phases.enter(STEP, step)
    yield step, batch


def is_due(step: int, every: int) -> bool:
  """Returns whether `step` is a multiple of `every`; false if `every` is 0, which means never."""
  return every > 0 and step % every == 0


def _measure(
  measures: Sequence[Callable[[int, TrainState], Numbers | None]],
  step: int,
  state: TrainState,
  phases: Phases,
) -> Numbers:
  """Returns the numbers of all measures at a step, joined."""
  phases.enter(MEASURE, step)
  found = {name: x for measure in measures for name, x in (measure(step, state) or {}).items()}
  phases.enter(STEP, step)
  return found
