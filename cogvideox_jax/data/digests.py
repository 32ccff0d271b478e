"""Digests (sha256) of a checkpoint: of its arrays as they were in memory, and of its files.

`digests.json` holds both and the package's version, and is written last. Files are checked before
Orbax reads them, because Orbax restores flipped bits silently and raises many kinds of errors for
other damage.
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
from cogvideox_jax.version import __version__

NAME = "digests.json"
INCOMPLETE = "the run was stopped before it was completely written"


class UnusableError(Exception):
  """A checkpoint cannot be used; the message is the reason, in one line."""


Described = dict[str, dict[str, Any]]  # Path -> sha256, shape and type of an array.


def describe(arrays: dict[str, np.ndarray]) -> Described:
  """Hashes arrays, given by their paths."""
  digests = _on_all_cores(_hash_array, arrays.values())
  return {
    path: {"sha256": digest, "shape": list(array.shape), "dtype": array.dtype.name}
    for (path, array), digest in zip(arrays.items(), digests, strict=True)
  }


def overall(arrays: Described) -> str:
  """Returns one sha256 for all arrays: that of the lines `PATH SHA256`, in the order of paths."""
  lines = "".join(f"{path} {arrays[path]['sha256']}\n" for path in sorted(arrays))
  return hashlib.sha256(lines.encode()).hexdigest()


def write(folder: epath.Path, arrays: Described, files: dict[str, str] | None = None) -> None:
  """Adds the digests to a checkpoint whose files are all written.

  Args:
    files: what `describe_files` returns for all of them; None reads them now.
  """
  if files is None:
    files = describe_files(folder, list(files_in(folder)))
  record = {"version": __version__, "arrays": arrays, "files": files}
  text = json.dumps({"sha256": _hash_json(record), **record}, indent=1)
  write_atomically(folder / NAME, text.encode())


def describe_files(folder: epath.Path, files: Sequence[epath.Path]) -> dict[str, str]:
  """Hashes files of a folder: path in the folder -> sha256."""
  names = [file.relative_to(folder).as_posix() for file in files]
  return dict(zip(names, hash_files(files), strict=True))


def read(folder: epath.Path, share: slice = slice(None)) -> Described:
  """Checks the files of a checkpoint; returns what `describe` returned for its arrays.

  Args:
    share: which of the files, in order, to check; other processes check the others.

  Raises:
    UnusableError: names the first file that is not as it was written.
  """
  record = _read_record(folder)
  names = list(record["files"])[share]
  files = [folder / name for name in names]
  for name, file in zip(names, files, strict=True):
    if not file.exists():
      raise UnusableError(f"{name} is missing")
  for name, digest in zip(names, hash_files(files), strict=True):
    if digest != record["files"][name]:
      raise UnusableError(f"{name} is damaged: its sha256 differs")
  return record["arrays"]


def version(folder: epath.Path) -> str | None:
  """The package's version that wrote a checkpoint; None if the checkpoint does not say it.

  Raises:
    UnusableError: digests.json is missing or damaged.
  """
  return _read_record(folder).get("version")


def _read_record(folder: epath.Path) -> dict[str, Any]:
  if not (folder / NAME).exists():
    raise UnusableError(INCOMPLETE)
  try:
    record = json.loads((folder / NAME).read_bytes())
    intact = record.pop("sha256") == _hash_json(record)
  except (ValueError, KeyError, AttributeError) as error:
    raise UnusableError(f"{NAME} is damaged: {error}") from error
  if not intact:
    raise UnusableError(f"{NAME} is damaged: its own sha256 differs")
  return record


def files_in(folder: epath.Path) -> Iterator[epath.Path]:
  """Yields all files of a folder and of the folders in it, in order."""
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from files_in(path)
    else:
      yield path


def hash_files(files: Iterable[epath.Path]) -> list[str]:
  """Returns the sha256 of each file."""
  return _on_all_cores(_hash_file, files)


def _on_all_cores(hasher: Callable[[Any], str], items: Iterable[Any]) -> list[str]:
  """Hashes in threads, about 1 GB/s on each core, because hashlib releases Python's lock."""
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
