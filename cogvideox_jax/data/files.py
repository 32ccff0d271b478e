"""Writes files so that a kill, a full disk or a power cut leaves no half-written file."""

import contextlib
import hashlib
import io
import os
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from cogvideox_jax.errors import UserError


def write_atomically(path: epath.Path, data: bytes) -> None:
  """Writes a small file, of which a reader finds the old version, the new one, or none.

  The data is on the disk before the file gets its name.
  """
  partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
  partial.write_bytes(data)
  settle(partial)
  partial.replace(path)


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
  """Writes a file so that no reader finds half of it.

  Unlike `write_atomically` it does not wait for the disk, so a power cut may lose the file.
  """
  whole = epath.Path(path)
  unfinished = whole.with_name(whole.name + ".unfinished")
  unfinished.write_bytes(data)
  unfinished.replace(whole)


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
    raise UserError(
      f"cannot write {path}: {error}\n"
      "Free some space or choose a folder you may write to; the same command then goes on."
    ) from error
