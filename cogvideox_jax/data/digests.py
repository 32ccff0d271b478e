"""The sha256 of everything in a checkpoint: of its arrays as they were in memory, and of its files.

`digests.json`, written last into a checkpoint, holds both. Orbax restores flipped bits without a
word, and meets other damage with errors of every kind, so files are checked before it reads them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
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


def describe(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
  """Path -> sha256, shape and type of each array."""
  digests = _on_all_cores(_hash_array, arrays.values())
  return {
    path: {"sha256": digest, "shape": list(array.shape), "dtype": array.dtype.name}
    for (path, array), digest in zip(arrays.items(), digests, strict=True)
  }


def overall(arrays: dict[str, dict[str, Any]]) -> str:
  """One sha256 over all arrays: over the lines `PATH SHA256`, in the order of paths."""
  lines = "".join(f"{path} {arrays[path]['sha256']}\n" for path in sorted(arrays))
  return hashlib.sha256(lines.encode()).hexdigest()


def write(folder: epath.Path, arrays: dict[str, dict[str, Any]]) -> None:
  """Reads back the files of a checkpoint that is all written, and adds their digests."""
  files = list(files_in(folder))
  names = [file.relative_to(folder).as_posix() for file in files]
  hashes = hash_files(files)
  record = {"arrays": arrays, "files": dict(zip(names, hashes, strict=True))}
  text = json.dumps({"sha256": _hash_json(record), **record}, indent=1)
  write_atomically(folder / NAME, text.encode())


def read(folder: epath.Path) -> dict[str, dict[str, Any]]:
  """What `describe` said of the arrays, once every file of the checkpoint is found as it was.

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
  files = [folder / name for name in record["files"]]
  for name, file in zip(record["files"], files, strict=True):
    if not file.exists():
      raise UnusableError(f"{name} is missing")
  for name, digest in zip(record["files"], hash_files(files), strict=True):
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
