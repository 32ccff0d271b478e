"""From the rows that this process reads to its part of the global batch on the mesh.

Which rows a process holds follows from the sharding alone: an axis that splits a row may span
processes, which then hold parts of the same rows, and devices need not stand in the order of
processes.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Sharding


def rows_here(rows: Sharding, count: int) -> tuple[int, ...]:
  """Which rows of a global batch of `count` this process's devices hold, ascending.

  rows: the sharding of an array of one number a row.
  """
  places = cast(Any, rows.addressable_devices_indices_map((count,)).values())
  return tuple(sorted({row for (run,) in places for row in range(count)[run]}))


def place(batch: Any, mine: Sequence[int], count: int, places: Any) -> Any:
  """The global batch, of which this process gives what its devices hold.

  Args:
    batch: of host arrays, or a part of one: this process's rows.
    mine: their numbers in the global batch, ascending; every row that its devices hold.
    count: rows of the global batch.
    places: the sharding of each array of the batch; one stands for all below it.
  """
  where = {row: number for number, row in enumerate(mine)}

  def put(sharding: Sharding, array: np.ndarray) -> jax.Array:
    def part(index: Any) -> np.ndarray:
      run = [where[row] for row in range(count)[index[0]]]
      # Rows in turn here stand in turn in `mine`, which ascends and leaves none of them out.
      return array[run[0] : run[-1] + 1][(slice(None), *index[1:])]

    return jax.make_array_from_callback((count, *array.shape[1:]), sharding, part)

  def put_all(sharding: Sharding, part: Any) -> Any:
    return jax.tree.map(partial(put, sharding), part)

  return jax.tree.map(put_all, places, batch)
