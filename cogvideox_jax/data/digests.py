"""The sha256 of everything in a checkpoint: of its arrays as they were in memory, and of its files.

`digests.json`, written last into a checkpoint, holds both. Orbax restores flipped bits without a
word, and meets other damage with errors of every kind, so files are checked before it reads them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from typing import Any, cast

import numpy as np
from etils import epath

from cogvideox_jax.data.files import write_atomically

NAME = "digests.json"
INCOMPLETE = "the run was stopped before it was completely written"


class UnusableError(Exception):
  """Why a checkpoint is passed over, in a line."""


Described = dict[str, dict[str, Any]]  # Path -> sha256, shape and type of an array.


def describe(arrays: dict[str, np.ndarray]) -> Described:
  digests = _on_all_cores(_hash_array, arrays.values())
  return {
    path: {"sha256": digest, "shape": list(array.shape), "dtype": array.dtype.name}
    for (path, array), digest in zip(arrays.items(), digests, strict=True)
  }


def overall(arrays: Described) -> str:
  """One sha256 over all arrays: over the lines `PATH SHA256`, in the order of paths."""
  lines = "".join(f"{path} {arrays[path]['sha256']}\n" for path in sorted(arrays))
  return hashlib.sha256(lines.encode()).hexdigest()


def write(folder: epath.Path, arrays: Described, files: dict[str, str] | None = None) -> None:
  """Adds the digests to a checkpoint that is all written.

  files: what `describe_files` says of all of them; None reads them.
  """
  if files is None:
    files = describe_files(folder, list(files_in(folder)))
  record = {"arrays": arrays, "files": files}
  text = json.dumps({"sha256": _hash_json(record), **record}, indent=1)
  write_atomically(folder / NAME, text.encode())


def describe_files(folder: epath.Path, files: Sequence[epath.Path]) -> dict[str, str]:
  """Path in the folder -> sha256."""
  names = [file.relative_to(folder).as_posix() for file in files]
  return dict(zip(names, hash_files(files), strict=True))


def read(folder: epath.Path, share: slice = slice(None)) -> Described:
  """What `describe` said of the arrays, once every file of the checkpoint is found as it was.

  share: of the files, in order, those to look at; others look at the rest.

  Raises:
    UnusableError: names the first file that is not.
  """
  if not (folder / NAME).exists():
    raise UnusableError(INCOMPLETE)
  try:
    record = json.loads((folder / NAME).read_bytes())
    intact = record.pop("sha256") == _hash_json(record)
  except (ValueError, KeyError, AttributeError) as error:
    raise UnusableError(f"{NAME} is damaged: {error}") from error
  if not intact:
    raise UnusableError(f"{NAME} is damaged: its own sha256 differs")
  names = list(record["files"])[share]
  files = [folder / name for name in names]
  for name, file in zip(names, files, strict=True):
    if not file.exists():
      raise UnusableError(f"{name} is missing")
  for name, digest in zip(names, hash_files(files), strict=True):
    if digest != record["files"][name]:
      raise UnusableError(f"{name} is damaged: its sha256 differs")
  return record["arrays"]


def files_in(folder: epath.Path) -> Iterator[epath.Path]:
  """All files of a folder, those of its folders too, in order."""
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from files_in(path)
    else:
      yield path


def hash_files(files: Iterable[epath.Path]) -> list[str]:
  """The sha256 of each."""
  return _on_all_cores(_hash_file, files)


def _on_all_cores(hasher: Callable[[Any], str], items: Iterable[Any]) -> list[str]:
  """About 1 GB/s on each: hashlib lets go of Python's lock."""
  with ThreadPoolExecutor() as pool:
    return list(pool.map(hasher, items))


def _hash_array(array: np.ndarray) -> str:
  data = memoryview(cast(Any, np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
  return hashlib.sha256(data).hexdigest()


def _hash_file(path: epath.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()


def _hash_json(record: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
