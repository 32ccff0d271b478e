"""A folder that appears under its name only when it is complete."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator

from etils import epath

from cogvideox_jax.data import locks
from cogvideox_jax.errors import UserError
from cogvideox_jax.paths import is_address

SUFFIX = ".partial"


@contextlib.contextmanager
def folder_beside(target: epath.Path) -> Iterator[epath.Path]:
  """Gives an empty folder with the target's name, in a hidden one beside the target.

  The hidden one is removed at the end. Those that killed runs left are removed first: the lock in
  them says that they are ours, and that nobody writes to them any more.
  """
  _remove_abandoned(target)
  if is_address(os.fspath(target)):
    hidden = target.with_name(f"{_prefix(target)}{uuid.uuid4().hex}{SUFFIX}")
  else:
    hidden = epath.Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=SUFFIX, dir=target.parent))
  lock = locks.take(hidden)
  try:
    draft = hidden / target.name
    draft.mkdir()
    yield draft
  finally:
    lock.release()
    hidden.rmtree()


def _prefix(target: epath.Path) -> str:
  return f".{target.name[:100]}."


def _remove_abandoned(target: epath.Path) -> None:
  for path in target.parent.iterdir():
    if not (path.name.startswith(_prefix(target)) and path.name.endswith(SUFFIX)):
      continue
    if not (path / locks.NAME).is_file() or os.path.islink(path):
      continue
    try:
      lock = locks.take(path)
    except UserError:  # It is being written.
      continue
    lock.release()
    path.rmtree()
