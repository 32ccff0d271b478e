"""Finds the digests of a checkpoint whose arrays are sharded over several processes.

Each process checks that its shards equal what is on disk, then hashes its share of the files and of
the arrays read back. Together they read the checkpoint twice. The digests equal those that a single
process finds which holds all arrays.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from cogvideox_jax.conversion import orbax
from cogvideox_jax.data import digests
from cogvideox_jax.data.digests import Described, UnusableError
from cogvideox_jax.data.files import write_atomically

Index = tuple[slice, ...]
Shards = dict[str, list[tuple[Index, np.ndarray]]]  # Path -> index and data of each shard.

PROCESS_FILE = "digests.part-{}.json"  # Holds what one process found, until all are read.
POLL_SECONDS = 0.2


def copies(arrays: dict[str, jax.Array]) -> Shards:
  """Returns copies of this process's shards. Of the replicas of a shard, one process takes one."""
  shards = {
    path: [shard for shard in array.addressable_shards if shard.replica_id == 0]
    for path, array in arrays.items()
  }
  for of_array in shards.values():
    for shard in of_array:
      shard.data.copy_to_host_async()
  return {
    path: [(shard.index, np.array(shard.data)) for shard in of_array]
    for path, of_array in shards.items()
  }


def describe(folder: epath.Path, held: Shards) -> Described:
  """Returns digests of this process's share of the arrays of a checkpoint that is fully written.

  Args:
    held: the shards that this process holds.

  Raises:
    UnusableError: a shard differs from what is on disk.
  """
  stored: dict[str, Any] = orbax.stored(folder, held)  # Any, because slices can be read of these.
  for path, shards in held.items():
    for index, shard in shards:
      if not np.array_equal(_bytes(stored[path][index]), _bytes(shard)):
        raise UnusableError(f"{path} is not what was saved")
  found = {}
  for path in share(sorted(held)):  # One at a time, because an array may fill a host's memory.
    found |= digests.describe({path: stored[path][...]})
  return found


def share(items: Sequence[Any]) -> Sequence[Any]:
  """Returns the items that this process works on, of those that all processes share."""
  return items[jax.process_index() :: jax.process_count()]


def give(folder: epath.Path, held: Shards) -> None:
  """Writes a file into a checkpoint with the digests that this process finds, for `take`.

  Raises:
    UnusableError: a shard differs from what is on disk; the file says so, too.
  """
  record: dict[str, Any] = {"fault": ""}
  try:
    record["arrays"] = describe(folder, held)
    files = [file for file in digests.files_in(folder) if not file.name.startswith("digests.")]
    record["files"] = digests.describe_files(folder, share(files))
  except UnusableError as error:
    record["fault"] = str(error)
  path = folder / PROCESS_FILE.format(jax.process_index())
  write_atomically(path, json.dumps(record).encode())
  if record["fault"]:
    raise UnusableError(record["fault"])


def take(folder: epath.Path) -> tuple[Described, dict[str, str]]:
  """Waits for the files that all processes `give`, and returns the digests of arrays and of files.

  Raises:
    UnusableError: a process has found a fault.
  """
  arrays: Described = {}
  files: dict[str, str] = {}
  given = [folder / PROCESS_FILE.format(index) for index in range(jax.process_count())]
  for path in given:
    while not path.exists():  # This ends: if the other process is dead, JAX ends this one, too.
      time.sleep(POLL_SECONDS)
    record = json.loads(path.read_text())
    if record["fault"]:
      raise UnusableError(record["fault"])
    arrays |= record["arrays"]
    files |= record["files"]
  for path in given:
    path.unlink()
  return arrays, files


def _bytes(array: np.ndarray) -> np.ndarray:
  """Returns an array as bytes, so that NaN equals NaN and -0 differs from 0."""
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
