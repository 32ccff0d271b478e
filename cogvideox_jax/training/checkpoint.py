"""Writes checkpoints while training goes on, and verifies them when they are read.

`checkpoints/STEP/` is an Orbax checkpoint of the state's arrays by path, and their digests. A
checkpoint is complete once its digests are written, and is used only if its arrays match them.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from cogvideox_jax import hosts, paths
from cogvideox_jax.conversion import orbax, tensors
from cogvideox_jax.data import digests
from cogvideox_jax.data.digests import Described, UnusableError
from cogvideox_jax.errors import UserError, remedy
from cogvideox_jax.training import guard, shard_digests
from cogvideox_jax.training.state import TrainState
from cogvideox_jax.types import Params
from cogvideox_jax.version import name_writer

T = TypeVar("T")
Arrays = dict[str, Any]  # Path -> array.
# Devices that hold copies of an array each write a slice of it, unless slices would be smaller than
# this: cutting small arrays took most of the time of a small save.
MIN_SLICE_BYTES = 2**20
UNFINISHED = ".orbax-checkpoint-tmp"  # In the names of folders that Orbax is writing.
GUARD = "guard/"  # Begins the paths of the arrays by which a training tells bad steps.
STATE_FIELDS = {"ema": "ema", "raw": "params"}  # Name of the weights -> field of the state.


class Restored(NamedTuple):
  """A state that was read back."""

  state: TrainState
  skipped: dict[int, str]  # Newer step -> why its checkpoint was passed over.


class Checkpoints:
  """The checkpoints of one run. Every process of a job makes the same calls in the same order."""

  def __init__(
    self,
    folder: epath.Path,
    *,
    keep: int,
    on_saved: Callable[[int, str], object],
    before: Callable[[], None] = lambda: None,
  ):
    """Takes the folder of a run's checkpoints, which need not exist.

    Removes what Orbax had begun to write in runs that ended, because on a full disk it is in the
    way.

    Args:
      keep: how many checkpoints are kept, the newest.
      on_saved: called with a step and its digest once it is committed, from another thread.
      before: called before each save, which does not begin if it raises.
    """
    if hosts.is_first():
      _remove_unfinished(folder)
    hosts.wait("swept")
    self._before = before
    self._folder = folder
    self._keep = keep
    self._on_saved = on_saved
    self._worker = ThreadPoolExecutor(1, "checkpoint")
    self._pending: tuple[int, Future[None]] | None = None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
    """Waits for a save under way. If there is an error already, a failed save raises no other."""
    if kind is None:
      self.wait()
    # If a process is gone, no save can be completed.
    lost = error is not None and hosts.is_loss(error)
    self._worker.shutdown(wait=not lost)

  def save(self, step: int, state: TrainState) -> None:
    """Copies the state without its frozen parameters, then hashes and writes it in the background.

    Raises:
      UserError: the save before this one has failed.
    """
    self._before()
    self.wait()
    hosts.wait("saved before")
    orbax.quieten()
    arrays = tensors.flatten(state.saved())
    held = _host_copies(arrays) if _alone() else shard_digests.copies(arrays)
    tree = traverse_util.unflatten_dict(arrays, sep="/")
    context = ocp.Context()
    # A folder for each array, so that a message can name the array that is damaged.
    context.array.saving.use_ocdbt = False
    context.array.saving.min_slice_bytes_for_replica_parallel = MIN_SLICE_BYTES
    with context:
      response = ocp.save_async(self._folder / str(step), tree, overwrite=True)
    self._pending = step, self._worker.submit(self._commit, step, response.result, held)

  def check(self) -> None:
    """Raises a UserError if a save has failed; does not wait for one under way."""
    if self._pending and self._pending[1].done():
      self.wait()

  def wait(self) -> None:
    """Returns once the last save is committed.

    Raises:
      UserError: it could not be written; earlier checkpoints are intact.
    """
    if self._pending:
      (step, future), self._pending = self._pending, None
      try:
        future.result()
      except (ValueError, OSError, UnusableError) as error:  # Orbax's store raises ValueError.
        good = good_steps(self._folder)
        raise UserError(
          f"The checkpoint of step {step} could not be written to {self._folder}:\n"
          f"{_first_line(error)}\n"
          f"Earlier checkpoints are intact ({f'newest: step {good[-1]}' if good else 'none yet'}). "
          f"{remedy(error) or 'Look after the folder.'} The same command then goes on from there."
        ) from error

  def restore(self, abstract: TrainState) -> Restored | None:
    """Restores the newest good checkpoint. Renames those that it passes over to STEP.skipped.

    They are renamed so that training can save these steps again.

    Args:
      abstract: shapes and shardings of the state; its frozen parameters are left out.

    Returns:
      The state without frozen parameters; None if no checkpoint was ever completed.

    Raises:
      UserError: there are completed checkpoints, but none of them is good.
    """
    good, skipped = self._newest_good(abstract.saved())
    if good is None and any(reason != digests.INCOMPLETE for reason in skipped.values()):
      reasons = "\n".join(f"step {step}: {reason}" for step, reason in skipped.items())
      raise UserError(
        f"None of the checkpoints in {self._folder} can be used:\n{reasons}\n"
        "Restore them from a copy, or start again in a new workdir."
      )
    if hosts.is_first():
      for step in skipped:
        _set_aside(self._folder / str(step))
    return Restored(good, skipped) if good else None

  def good(self) -> list[int]:
    """Returns what `good_steps` finds in the first process, because others may see it later."""
    return json.loads(hosts.each(json.dumps(good_steps(self._folder)))[0])

  def drop_after(self, step: int) -> None:
    """Renames the checkpoints of later steps, which a run that goes back takes again."""
    self.wait()
    hosts.wait("going back")
    if hosts.is_first():
      for later in good_steps(self._folder):
        if later > step:
          _set_aside(self._folder / str(later))
    hosts.wait("went back")

  def _newest_good(self, abstract: TrainState) -> tuple[TrainState | None, dict[int, str]]:
    """Returns the newest state that can be used, and why newer checkpoints cannot, by step."""
    skipped: dict[int, str] = {}
    # All processes take the first one's list, because others may see recent changes later.
    steps = json.loads(hosts.each(json.dumps(_steps(self._folder)))[0])
    for step in reversed(steps):
      try:
        return _load_state(self._folder / str(step), abstract), skipped
      except UnusableError as error:
        skipped[step] = str(error)
    return None, skipped

  def _commit(self, step: int, finish_writing: Callable[[], None], held: Any) -> None:
    """Completes a checkpoint with its digests, and removes the oldest. Runs in the background.

    Args:
      finish_writing: returns once all arrays are written.
      held: host copies of the arrays, or of this process's shards, as they were saved.
    """
    path = self._folder / str(step)
    if _alone():
      arrays, files = digests.describe(held), None
      finish_writing()
    else:
      finish_writing()
      shard_digests.give(path, held)
      if not hosts.is_first():
        return
      arrays, files = shard_digests.take(path)
    digests.write(path, arrays, files)
    for old in good_steps(self._folder)[: -self._keep]:
      _remove(self._folder / str(old))
    self._on_saved(step, digests.overall(arrays))


class Weights(NamedTuple):
  """The transformer's parameters of a checkpoint."""

  step: int
  params: Params


def open_weights(workdir: epath.PathLike, weights: str = "ema") -> Weights:
  """Returns the weights of a workdir's newest good checkpoint. Arrays are read when they are used.

  Args:
    workdir: what `train --workdir` was given.
    weights: `ema`, the moving average, or `raw`, the weights as trained.

  Raises:
    UserError: no such folder, no checkpoint in it, or none that is good.
  """
  if weights not in STATE_FIELDS:
    raise UserError(f"weights must be ema or raw, not {weights!r}.")
  folder = epath.Path(paths.absolute(workdir)) / "checkpoints"
  prefix = f"{STATE_FIELDS[weights]}/"
  reasons = []
  for step in reversed(good_steps(folder)):
    try:
      found = orbax.open_arrays(folder / str(step))
    except UnusableError as error:
      reasons.append(f"step {step}: {error}")
      continue
    arrays = {name.removeprefix(prefix): x for name, x in found.items() if name.startswith(prefix)}
    return Weights(step, traverse_util.unflatten_dict(arrays, sep="/"))
  raise UserError("\n".join([f"There is no checkpoint to use in {folder}.", *reasons]))


def load_weights(workdir: epath.PathLike, weights: str = "ema") -> Params:
  """Returns the parameters of `open_weights` as arrays in the host's memory."""
  return tensors.materialize(open_weights(workdir, weights).params)


def good_steps(folder: epath.Path) -> list[int]:
  """Returns the steps whose checkpoints were completed, oldest first. Their arrays are not read."""
  return [step for step in _steps(folder) if (folder / str(step) / digests.NAME).exists()]


def _load_state(path: epath.Path, abstract: TrainState) -> TrainState:
  """Loads a checkpoint; an UnusableError if its files or arrays are not as they were saved."""
  share = slice(jax.process_index(), None, jax.process_count())
  described, targets = _agreed(lambda: digests.read(path, share)), tensors.flatten(abstract)
  # Earlier versions had no guard, which begins with this checkpoint then.
  begins = [name for name in targets if name.startswith(GUARD) and name not in described]
  missing = {name: targets.pop(name) for name in begins}
  shapes = {name: tuple(about["shape"]) for name, about in described.items()}
  wanted = {name: target.shape for name, target in targets.items()}
  names = sorted(shapes.keys() | wanted.keys())
  if odd := [name for name in names if shapes.get(name) != wanted.get(name)]:
    reason = f"its arrays are not this model's: {', '.join(odd[:3])} ({len(odd)} in all)"
    raise UnusableError(". ".join(filter(None, [reason, name_writer(digests.version(path))])))
  arrays = _load(path, targets, described) | _begin_guard(missing)
  names = tensors.flatten(abstract)
  return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in names])


def _begin_guard(targets: Arrays) -> Arrays:
  """Returns the arrays of a guard that has seen no step, or none if there are no targets."""
  if not targets:
    return {}
  watched = targets[f"{GUARD}recent"].shape[0]
  first = tensors.flatten({"guard": guard.begin(watched)})
  return {
    name: jax.make_array_from_callback(target.shape, target.sharding, partial(_part, first[name]))
    for name, target in targets.items()
  }


def _part(array: Any, index: Any) -> Any:
  return np.asarray(array)[index]


def _load(path: epath.Path, targets: Arrays, described: Described) -> Arrays:
  """Loads arrays on the shardings of `targets`; an UnusableError if a digest differs."""
  orbax.quieten()
  arrays = tensors.flatten(ocp.load(path, traverse_util.unflatten_dict(targets, sep="/")))

  def check() -> None:
    found = (
      digests.describe(_host_copies(arrays))
      if _alone()
      else shard_digests.describe(path, shard_digests.copies(arrays))
    )
    for name, about in found.items():
      if about != described[name]:
        raise UnusableError(f"{name} is not what was saved: its sha256 differs")

  _agreed(check)
  return arrays


def _agreed(check: Callable[[], T]) -> T:
  """Returns what a check returns, unless it fails in a process; then all raise the first fault."""
  found, fault = None, ""
  try:
    found = check()
  except UnusableError as error:
    fault = str(error)
  if faults := [one for one in hosts.each(fault) if one]:
    raise UnusableError(faults[0])
  return cast(T, found)


def _alone() -> bool:
  return jax.process_count() == 1


def _host_copies(arrays: Arrays) -> dict[str, np.ndarray]:
  """Returns copies in the host's memory, because the next step reuses the devices' buffers."""
  for array in arrays.values():
    if isinstance(array, jax.Array):
      array.copy_to_host_async()
  return {path: np.array(array) for path, array in arrays.items()}


def _steps(folder: epath.Path) -> list[int]:
  if not folder.exists():
    return []
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def _remove_unfinished(folder: epath.Path) -> None:
  """Removes the folders that Orbax renames once they are whole."""
  for path in folder.iterdir() if folder.exists() else ():
    if UNFINISHED in path.name and path.name.split(".")[0].isdecimal() and not os.path.islink(path):
      path.rmtree()


def _remove(path: epath.Path) -> None:
  (path / digests.NAME).unlink()  # First, so that a checkpoint half removed is never used.
  path.rmtree()


def _set_aside(path: epath.Path) -> None:
  target = path.with_name(f"{path.name}.skipped")
  if target.exists():
    target.rmtree()
  path.rename(target)


def _first_line(error: BaseException) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:300]
