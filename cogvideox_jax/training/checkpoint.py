"""Checkpoints that are known to be good: written beside training, and verified when read.

`checkpoints/STEP/` is an Orbax checkpoint of the state's arrays by path, with their digests beside
them. A step counts only once its digests are written, and is used only if they hold.
"""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from cogvideox_jax import hosts
from cogvideox_jax.conversion import orbax, tensors
from cogvideox_jax.data import digests
from cogvideox_jax.data.digests import Described, UnusableError
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import shard_digests
from cogvideox_jax.training.state import TrainState
from cogvideox_jax.types import Params
from cogvideox_jax.version import name_writer

T = TypeVar("T")
Arrays = dict[str, Any]  # Path -> array.


class Restored(NamedTuple):
  """A state read back, and why newer steps were passed over."""

  state: TrainState
  skipped: dict[int, str]


class Checkpoints:
  """The checkpoints of one run. Every process of a job makes the same calls in the same order."""

  def __init__(self, folder: epath.Path, *, keep: int, on_saved: Callable[[int, str], object]):
    """on_saved: told a step and its digest once it is committed, from another thread."""
    self._folder = folder
    self._keep = keep
    self._on_saved = on_saved
    self._worker = ThreadPoolExecutor(1, "checkpoint")
    self._pending: tuple[int, Future[None]] | None = None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
    """Waits for a save under way; its failure is not raised over another error."""
    if kind is None:
      self.wait()
    lost = error is not None and hosts.is_loss(error)  # Then no save will ever be whole.
    self._worker.shutdown(wait=not lost)

  def save(self, step: int, state: TrainState) -> None:
    """Copies the state but what is frozen; hashing and writing go on beside the next steps."""
    self.wait()
    hosts.wait("saved before")
    orbax.quieten()
    arrays = tensors.flatten(state.saved())
    held = _host_copies(arrays) if _alone() else shard_digests.copies(arrays)
    tree = traverse_util.unflatten_dict(arrays, sep="/")
    context = ocp.Context()
    context.array.saving.use_ocdbt = False  # A folder for each array, so that damage has a name.
    with context:
      response = ocp.save_async(self._folder / str(step), tree, overwrite=True)
    self._pending = step, self._worker.submit(self._commit, step, response.result, held)

  def check(self) -> None:
    """Raises the UserError of a save that has failed, without waiting for one under way."""
    if self._pending and self._pending[1].done():
      self.wait()

  def wait(self) -> None:
    """Returns when the last save is committed.

    Raises:
      UserError: it could not be; earlier checkpoints are as they were.
    """
    if self._pending:
      (step, future), self._pending = self._pending, None
      try:
        future.result()
      except (ValueError, OSError, UnusableError) as error:  # The first from Orbax's store.
        good = good_steps(self._folder)
        raise UserError(
          f"The checkpoint of step {step} could not be written to {self._folder}:\n"
          f"{_first_line(error)}\n"
          f"Earlier checkpoints are intact ({f'newest: step {good[-1]}' if good else 'none yet'}). "
          "Make room, or the folder writable; the same command then goes on from there."
        ) from error

  def restore(self, abstract: TrainState) -> Restored | None:
    """Restores the newest good step, on the shardings of `abstract`, with nothing frozen.

    Returns None if no step was ever completed.

    Steps that are passed over are renamed to STEP.skipped, so that training can save them anew.

    Raises:
      UserError: there are completed checkpoints, but none of them is good.
    """
    abstract = abstract.saved()
    skipped: dict[int, str] = {}
    good = None
    # As the first process lists them: another may not see yet what was done a moment ago.
    steps = json.loads(hosts.each(json.dumps(_steps(self._folder)))[0])
    for step in reversed(steps):
      try:
        good = _load_state(self._folder / str(step), abstract)
        break
      except UnusableError as error:
        skipped[step] = str(error)
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

  def _commit(self, step: int, written: Callable[[], None], held: Any) -> None:
    path = self._folder / str(step)
    arrays, files = digests.describe(held) if _alone() else {}, None
    written()
    if not _alone():
      shard_digests.give(path, held)
    if not hosts.is_first():
      return
    if not _alone():
      arrays, files = shard_digests.take(path)
    digests.write(path, arrays, files)
    for old in good_steps(self._folder)[: -self._keep]:
      _remove(self._folder / str(old))
    self._on_saved(step, digests.overall(arrays))


class Weights(NamedTuple):
  """The transformer's parameters as a run had them."""

  step: int
  params: Params


def open_weights(workdir: epath.PathLike, weights: str = "ema") -> Weights:
  """Those of a training workdir's newest good checkpoint, lazy.

  Args:
    workdir: what `train --workdir` was given.
    weights: `ema`, the moving average, or `raw`, the weights as trained.

  Raises:
    UserError: no such folder, no checkpoint in it, or none that is good.
  """
  parts = {"ema": "ema", "raw": "params"}
  if weights not in parts:
    raise UserError(f"weights must be ema or raw, not {weights!r}.")
  folder, prefix = epath.Path(workdir) / "checkpoints", f"{parts[weights]}/"
  reasons = []
  for step in reversed(good_steps(folder)):
    try:
      found = orbax.open_arrays(folder / str(step))
    except UnusableError as error:
      reasons.append(f"step {step}: {error}")
      continue
    part = {name.removeprefix(prefix): x for name, x in found.items() if name.startswith(prefix)}
    return Weights(step, traverse_util.unflatten_dict(part, sep="/"))
  raise UserError("\n".join([f"There is no checkpoint to use in {folder}.", *reasons]))


def load_weights(workdir: epath.PathLike, weights: str = "ema") -> Params:
  """Their parameters, as arrays on the host."""
  return tensors.materialize(open_weights(workdir, weights).params)


def good_steps(folder: epath.Path) -> list[int]:
  """The steps that were completed, oldest first; whether their arrays hold is not checked."""
  return [step for step in _steps(folder) if (folder / str(step) / digests.NAME).exists()]


def _load_state(path: epath.Path, abstract: TrainState) -> TrainState:
  share = slice(jax.process_index(), None, jax.process_count())
  described, targets = _agreed(lambda: digests.read(path, share)), tensors.flatten(abstract)
  shapes = {name: tuple(about["shape"]) for name, about in described.items()}
  wanted = {name: target.shape for name, target in targets.items()}
  names = sorted(shapes.keys() | wanted.keys())
  if odd := [name for name in names if shapes.get(name) != wanted.get(name)]:
    reason = f"its arrays are not this model's: {', '.join(odd[:3])} ({len(odd)} in all)"
    raise UnusableError(". ".join(filter(None, [reason, name_writer(digests.version(path))])))
  arrays = _load(path, targets, described)
  return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in targets])


def _load(path: epath.Path, targets: Arrays, described: Described) -> Arrays:
  """Arrays by path, placed as `targets`, that are what was saved."""
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
  """What a check returns where no process finds a fault; else all raise the first one's."""
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
  """Copies, since the next step is given the buffers to write to."""
  for array in arrays.values():
    if isinstance(array, jax.Array):
      array.copy_to_host_async()
  return {path: np.array(array) for path, array in arrays.items()}


def _steps(folder: epath.Path) -> list[int]:
  if not folder.exists():
    return []
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def _remove(path: epath.Path) -> None:
  (path / digests.NAME).unlink()  # First, so that half a checkpoint is never good.
  path.rmtree()


def _set_aside(path: epath.Path) -> None:
  target = path.with_name(f"{path.name}.skipped")
  if target.exists():
    target.rmtree()
  path.rename(target)


def _first_line(error: BaseException) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:300]
