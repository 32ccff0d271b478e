"""Writes files so that a kill, a full disk or a power cut leaves no half-written file."""

import contextlib
import hashlib
import io
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from etils import epath

from cogvideox_jax.errors import UserError, remedy
from cogvideox_jax.paths import is_address


def write_atomically(path: epath.Path, data: bytes) -> None:
  """Writes a small file, of which a reader finds the old version, the new one, or none.

  The data is on the disk before the file gets its name.
  """
  with _draft(path) as draft:
    draft.write_bytes(data)
    settle(draft)


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
  """Writes a file so that no reader finds half of it.

  Unlike `write_atomically` it does not wait for the disk, so a power cut may lose the file.
  """
  with _draft(epath.Path(path)) as draft:
    draft.write_bytes(data)


def copy_whole(path: str | os.PathLike[str], file: IO[bytes]) -> None:
  """Writes what a file holds from its beginning on, as `write_whole` does."""
  file.seek(0)
  with _draft(epath.Path(path)) as draft, draft.open("wb") as target:
    shutil.copyfileobj(file, target)


@contextlib.contextmanager
def _draft(path: epath.Path) -> Iterator[epath.Path]:
  """Gives a new file beside a path, and renames it to the path at the end."""
  draft = new_draft(path)
  try:
    yield draft
    draft.replace(path)
  except BaseException:
    draft.unlink(missing_ok=True)
    raise


def new_draft(path: epath.Path) -> epath.Path:
  """Makes an empty file beside a path, to be written and then renamed to the path.

  No file had its name, so that nothing is written through a link or over a file of someone else.
  """
  draft = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.partial")
  if not is_address(os.fspath(path)):  # A bucket has no links, and shows whole objects alone.
    # Not by tempfile, whose files nobody else may read.
    os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
  return draft


def remove_drafts(path: epath.Path) -> None:
  """Removes the drafts of a path, which is right if nobody is writing to it."""
  name = re.compile(rf"\.{re.escape(path.name[:100])}\.[0-9a-f]{{32}}\.partial")
  for draft in path.parent.iterdir():
    if name.fullmatch(draft.name):
      draft.unlink(missing_ok=True)


def write_arrays(path: epath.Path, arrays: dict[str, Any]) -> None:
  """Writes an .npz file atomically."""
  buffer = io.BytesIO()
  np.savez(buffer, allow_pickle=False, **arrays)
  write_atomically(path, buffer.getvalue())


def settle(path: epath.Path) -> dict[str, Any]:
  """Waits until a file is on the disk, so that a power cut cannot empty it.

  Returns its size as `bytes` and its `sha256`.
  """
  with open(path, "rb") as file:
    os.fsync(file.fileno())
  return {"bytes": path.stat().length, "sha256": sha256(path)}


def sha256(path: epath.Path) -> str:
  """Returns the sha256 of a file, in hexadecimal digits."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def disk_errors(path: epath.PathLike) -> Iterator[None]:
  """Turns a failure to write into a UserError that names `path`.

  It catches RuntimeError too, because ArrayRecord reports a full disk so.
  """
  try:
    yield
  except (OSError, RuntimeError) as error:
    advice = remedy(error) or "Choose another folder, or see what happened to this one."
    raise UserError(
      f"cannot write {path}: {error}\n{advice} The same command then goes on."
    ) from error
