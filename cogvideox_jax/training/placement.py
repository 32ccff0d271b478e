"""From the rows that this process reads to its part of the global batch on the mesh.

Which rows a process holds follows from the sharding alone: an axis that splits a row may span
processes, which then hold parts of the same rows, and devices need not stand in the order of
processes.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from cogvideox_jax import sharding
from cogvideox_jax.types import Batch


class Placement:
  """Where the global batches of a run lie, and what this process has to read of them."""

  def __init__(self, mesh: Mesh, rules: sharding.Rules, rows: int):
    """rows: of a global batch; a UserError if they do not divide over the mesh."""
    self._mesh, self._rules, self._rows = mesh, rules, rows
    self.mine = rows_here(sharding.row_sharding(mesh, rules, rows), rows)

  def place(self, batch: Batch) -> Batch:
    """The global batch, of which this process gives its rows, those of `mine` in their order."""
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((self._rows, *x.shape[1:]), x.dtype), batch
    )
    places = sharding.batch_shardings(shapes, self._mesh, self._rules)
    where = {row: number for number, row in enumerate(self.mine)}

    def put(array: np.ndarray, shape: jax.ShapeDtypeStruct, place: Sharding) -> jax.Array:
      def part(index: tuple[slice, ...]) -> np.ndarray:
        rows = [where[row] for row in range(self._rows)[index[0]]]
        # Rows in turn stand in turn in `mine`, which ascends and leaves none of them out.
        return array[(slice(rows[0], rows[-1] + 1), *index[1:])]

      return jax.make_array_from_callback(shape.shape, place, part)

    return jax.tree.map(put, batch, shapes, places)


def rows_here(place: Sharding, rows: int) -> tuple[int, ...]:
  """Which rows this process's devices hold of an array of one number a row, ascending."""
  runs: list[Any] = list(place.addressable_devices_indices_map((rows,)).values())
  return tuple(sorted({row for (run,) in runs for row in range(rows)[run]}))
