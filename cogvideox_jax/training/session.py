"""Opens a workdir for one start of a training, restores its state, and says how it ended."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import NamedTuple

from etils import epath
from jax.sharding import Mesh

from cogvideox_jax import hosts, peers
from cogvideox_jax.config.safety_schema import (
  NO_GUARD,
  NO_WATCHDOG,
  GuardConfig,
  WatchdogConfig,
)
from cogvideox_jax.data.files import disk_errors
from cogvideox_jax.interrupts import Interrupts
from cogvideox_jax.training.avoided import Avoided
from cogvideox_jax.training.bad_steps import BadSteps, GoBackError
from cogvideox_jax.training.checkpoint import Checkpoints
from cogvideox_jax.training.goodput import Timeline
from cogvideox_jax.training.metrics import RunLog
from cogvideox_jax.training.phases import SAVE, Phases
from cogvideox_jax.training.state import NOTHING, TrainState, with_frozen
from cogvideox_jax.training.stopping import Stopping
from cogvideox_jax.types import Params


class Session(NamedTuple):
  """What the steps of a training write to, and what may stop them."""

  folder: epath.Path  # The folder that holds the checkpoints.
  checkpoints: Checkpoints
  log: RunLog
  stopping: Stopping
  waits: bool  # Whether each step is waited for: on CPU, programs of many devices can deadlock.
  bad_steps: BadSteps  # Judges the steps that the guard skips.
  phases: Phases  # Is told what the training does.
  timeline: Timeline  # Writes how long it did what.

  def begin(
    self,
    like: TrainState,
    create: Callable[[], TrainState],
    *,
    steps: int,
    frozen: Params = NOTHING,
  ) -> TrainState:
    """Returns the state to go on from, restored or new, and says which.

    Args:
      like: the shapes and shardings of the state.
      create: makes a new state, with its frozen parameters.
      steps: steps of the whole training.
      frozen: the frozen parameters, which a checkpoint does not have.
    """
    restored = self.checkpoints.restore(like)
    for step, reason in (restored.skipped if restored else {}).items():
      self.log.event("checkpoint_skipped", step=step, reason=reason)
      say(f"Passed over the checkpoint of step {step}: {reason}.")
    state = with_frozen(restored.state, frozen, like) if restored else create()
    step = int(state.step)
    self.bad_steps.avoided.resume(step)
    self.log.event("resumed", step=step)
    self.timeline.begin(step)
    say(f"resumed at step {step} of {steps}" if restored else f"new run, {steps} steps")
    return state

  def go_back(self, bad: GoBackError) -> None:
    """Makes the checkpoint before some skipped steps the newest; `begin` then goes on from it.

    What made the steps bad is left out from now on.

    Raises:
      UserError: the run went back several times already and nothing helped, or there is nothing to
        go back to; or a save has failed.
    """
    self.checkpoints.wait()
    self.checkpoints.drop_after(self.bad_steps.plan_return(bad, self.checkpoints.good()))

  def lengthen(self, before: int, steps: int) -> None:
    """Says and logs that the training has more steps than before; nothing if it has not."""
    if before < steps:
      self.log.event("lengthened", steps_before=before, steps=steps)
      say(f"lengthened from {before} to {steps} steps; the schedule is that of the new number")

  def end(self, step: int, *, steps: int) -> int:
    """Waits for the last save, says how the training ended, and returns the exit code.

    Args:
      step: the last step taken.
      steps: steps of the whole training.
    """
    self.phases.enter(SAVE, step)
    self.checkpoints.wait()
    hosts.wait("trained")  # The first process may still be writing.
    self.timeline.note(step, now=True)
    say(self.timeline.summary())
    if self.stopping.exit_code is None or step == steps:
      say(f"Trained for {step} steps: {self.folder / str(step)}")
      return 0
    say(f"Stopped at step {step}, which is saved. The same command goes on from there.")
    return self.stopping.exit_code


@contextmanager
def opened(
  workdir: epath.Path,
  *,
  keep: int,
  mesh: Mesh,
  check_lock: Callable[[], None] = lambda: None,
  guard: GuardConfig = NO_GUARD,
  watchdog: WatchdogConfig = NO_WATCHDOG,
) -> Iterator[Session]:
  """Opens the log and the checkpoints of a workdir. Ctrl-C and SIGTERM then ask to stop.

  Args:
    keep: how many checkpoints are kept, the newest.
    mesh: the mesh of the stage that the training goes on with.
    check_lock: raises if another run writes to the workdir. It is called before each save.
    guard: what becomes of bad steps.
    watchdog: when the training counts as hung.

  Raises:
    UserError: the workdir cannot be written to; or, when it is left, the last save has failed.
  """
  with disk_errors(workdir):
    log = RunLog(workdir)

  def on_saved(step: int, digest: str) -> None:
    log.event("checkpoint_saved", step=step, digest=digest)
    log.upload()

  folder = workdir / "checkpoints"
  with (
    _explained(check_lock),
    closing(log),
    Phases(
      watchdog.seconds,
      on_hang=partial(log.event, "hung"),
      others=peers.others,
      tell=peers.tell,
    ) as phases,
    Interrupts() as interrupts,
    Checkpoints(folder, keep=keep, on_saved=on_saved, before=check_lock) as checkpoints,
  ):
    waits = mesh.devices.flat[0].platform == "cpu"
    bad_steps = BadSteps(log, Avoided(workdir), guard.in_a_row, say)
    stopping, timeline = Stopping(interrupts, mesh), Timeline(log, phases)
    yield Session(folder, checkpoints, log, stopping, waits, bad_steps, phases, timeline)


@contextmanager
def _explained(check_lock: Callable[[], None]) -> Iterator[None]:
  """Turns the missing files of a workdir that was removed into its UserError."""
  try:
    yield
  except FileNotFoundError:
    check_lock()
    raise


def say(text: str) -> None:
  """Prints a line, once for all processes of a job."""
  if hosts.is_first():
    print(text, flush=True)
