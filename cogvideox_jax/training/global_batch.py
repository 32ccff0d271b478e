"""Makes a global batch on the mesh from the rows that each process reads.

The sharding decides which rows a process reads. An axis that splits a row may span processes, which
then read the same rows and keep a shard of each. Devices need not be in the order of processes.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Sharding


def rows_here(rows: Sharding, count: int) -> tuple[int, ...]:
  """Returns the numbers of the rows that this process's devices hold, ascending.

  Args:
    rows: the sharding of an array with one number a row.
    count: rows of the global batch.
  """
  indices = cast(Any, rows.addressable_devices_indices_map((count,)).values())
  return tuple(sorted({row for (run,) in indices for row in range(count)[run]}))


def assemble(batch: Any, mine: Sequence[int], count: int, shardings: Any) -> Any:
  """Returns the global batch, to which this process gives the shards of its devices.

  Args:
    batch: this process's rows, as a tree of host arrays.
    mine: the numbers of these rows in the global batch, ascending: all that its devices hold.
    count: rows of the global batch.
    shardings: the sharding of each array of the batch; a sharding may stand for a whole subtree.
  """
  local = {row: number for number, row in enumerate(mine)}

  def put(sharding: Sharding, array: np.ndarray) -> jax.Array:
    def shard(index: Any) -> np.ndarray:
      run = [local[row] for row in range(count)[index[0]]]
      # Consecutive rows are consecutive in `mine`, which is ascending and has all of them.
      return array[run[0] : run[-1] + 1][(slice(None), *index[1:])]

    return jax.make_array_from_callback((count, *array.shape[1:]), sharding, shard)

  def put_all(sharding: Sharding, arrays: Any) -> Any:
    return jax.tree.map(partial(put, sharding), arrays)

  return jax.tree.map(put_all, shardings, batch)
