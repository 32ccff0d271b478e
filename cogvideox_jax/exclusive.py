"""Locks a folder for a job, of one process or several."""

import contextlib
from collections.abc import Callable, Iterator

from etils import epath

from cogvideox_jax import hosts
from cogvideox_jax.data import locks
from cogvideox_jax.errors import UserError


@contextlib.contextmanager
def exclusive(folder: epath.Path) -> Iterator[Callable[[], None]]:
  """Locks a folder while entered, so that no other job writes to it. Every process calls it.

  The first process holds the lock. It makes the folder, and removes it if it is empty at the end.

  Returns:
    A function that raises a UserError if another job has taken the folder over.

  Raises:
    UserError: in every process, another job holds the folder, or it cannot be written to.
  """
  lock, fault, is_new = None, "", not folder.exists()
  if hosts.is_first():
    try:
      lock = locks.take(folder)
    except UserError as error:
      fault = str(error)
  if fault := hosts.each(fault)[0]:
    raise UserError(fault)
  try:
    yield lock.check if lock else _nothing
  finally:
    if lock:
      lock.release()
      if is_new and folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def _nothing() -> None:
  """Other processes end with the first one."""
