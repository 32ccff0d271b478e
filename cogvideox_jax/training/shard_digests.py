"""Digests of a checkpoint of which each process holds a part, and none the whole.

Each compares the parts that it holds with what the files have of them, and hashes its share of the
files and, from the files, of the whole arrays: so all of it is read twice, by all together. The
digests are those that one process finds which holds everything.
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
Parts = dict[str, list[tuple[Index, np.ndarray]]]  # Path -> where each part is, and the part.

NAME = "digests.part-{}.json"
POLL = 0.2  # Seconds.


def copies(arrays: dict[str, jax.Array]) -> Parts:
  """Copies of what this process holds; of the replicas of a part, one process alone takes it."""
  held = {
    path: [shard for shard in array.addressable_shards if shard.replica_id == 0]
    for path, array in arrays.items()
  }
  for shards in held.values():
    for shard in shards:
      shard.data.copy_to_host_async()
  return {
    path: [(shard.index, np.array(shard.data)) for shard in shards] for path, shards in held.items()
  }


def describe(folder: epath.Path, held: Parts) -> Described:
  """Digests of this process's share of the arrays of a checkpoint that is all written.

  Raises:
    UnusableError: what the process holds is not what the files have.
  """
  stored: dict[str, Any] = orbax.stored(folder, held)  # Read by slices, as no other Lazy is.
  for path, parts in held.items():
    for index, part in parts:
      if not np.array_equal(_bytes(stored[path][index]), _bytes(part)):
        raise UnusableError(f"{path} is not what was saved")
  found = {}
  for path in share(sorted(held)):  # One by one: an array may fill a host's memory.
    found |= digests.describe({path: stored[path][...]})
  return found


def share(items: Sequence[Any]) -> Sequence[Any]:
  """Those of all items that are this process's to do."""
  return items[jax.process_index() :: jax.process_count()]


def give(folder: epath.Path, held: Parts) -> None:
  """Adds to a checkpoint, for `take`, what this process finds; or why it cannot be used."""
  record: dict[str, Any] = {"fault": ""}
  try:
    record["arrays"] = describe(folder, held)
    files = [file for file in digests.files_in(folder) if not file.name.startswith("digests.")]
    record["files"] = digests.describe_files(folder, share(files))
  except UnusableError as error:
    record["fault"] = str(error)
  write_atomically(folder / NAME.format(jax.process_index()), json.dumps(record).encode())
  if record["fault"]:
    raise UnusableError(record["fault"])


def take(folder: epath.Path) -> tuple[Described, dict[str, str]]:
  """What all processes have given, once all have: digests of the arrays, and of the files.

  Raises:
    UnusableError: one has found a fault.
  """
  arrays: Described = {}
  files: dict[str, str] = {}
  given = [folder / NAME.format(index) for index in range(jax.process_count())]
  for path in given:
    while not path.exists():  # Should the other be dead, this one will be ended, too.
      time.sleep(POLL)
    record = json.loads(path.read_text())
    if record["fault"]:
      raise UnusableError(record["fault"])
    arrays |= record["arrays"]
    files |= record["files"]
  for path in given:
    path.unlink()
  return arrays, files


def _bytes(array: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
