"""Finds the pairs of blocks of a packed row that share a segment: the kernels skip all others.

A kernel's grid step pairs a block of queries with a tile of keys (one or two blocks). It multiplies
the tile in key blocks, and skips each that shares no segment with the queries.

Everything is computed from the segment ids while the program runs. Ids never fall along a row, so
the blocks that share a segment with a given block are neighbours.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

LANES = 128  # Elements along a row of a TPU's vector register; every block is a multiple of it.
# In rows of this many blocks or more the grid is only as wide as the longest clip needs, because
# most of its steps would be skipped, and a skipped step still takes time.
MANY_BLOCKS = 128
# Greater than all segment ids: what fills the last block, so that it shares a segment with nothing.
NO_SEGMENT = np.iinfo(np.int32).max


class BlockSizes(NamedTuple):
  """Sizes in tokens, multiples of LANES."""

  block: int  # Queries of a grid step; divides the row.
  key_block: int  # Keys that are multiplied, or skipped, together; divides `block`.


def fit_blocks(tokens: int, largest: BlockSizes) -> BlockSizes:
  """The sizes, at most `largest`, that add the least padding to a row of this many tokens."""
  count = math.ceil(tokens / largest.block)
  block = LANES * math.ceil(tokens / count / LANES)
  return BlockSizes(block, largest.key_block if block % largest.key_block == 0 else block)


class Ranges(NamedTuple):
  """For each block, the range [start, stop) of the other side's blocks that share its segments."""

  start: Int[Array, "blocks"]
  stop: Int[Array, "blocks"]


class Edges(NamedTuple):
  """Segment ids of the first and the last token of each block: arrays, or refs in a kernel."""

  first: Any
  last: Any

  def of_group(self, index: Any, size: int) -> tuple[Any, Any]:
    """The edges of the group number `index`, if the blocks are put in groups of `size`."""
    return self.first[index * size], self.last[index * size + size - 1]


def block_edges(ids: Int[Array, "n"], block: int, multiple: int) -> Edges:
  """The edges of each block, once NO_SEGMENT has filled the row to a multiple of `multiple`."""
  ids = jnp.pad(ids, (0, -len(ids) % multiple), constant_values=NO_SEGMENT)
  return Edges(ids[::block], ids[block - 1 :: block])


def shared_ranges(ids: Int[Array, "n"], block: int, other_block: int) -> Ranges:
  """Which blocks of `other_block` tokens share a segment with each block of `block` tokens.

  ids: never falling along the row.
  """
  own, other = block_edges(ids, block, block), block_edges(ids, other_block, other_block)
  start = jnp.searchsorted(other.last, own.first, side="left")
  return Ranges(start, jnp.searchsorted(other.first, own.last, side="right"))


def block_to_load(block: Any, step: Any, start: Any, stop: Any, last: int) -> Any:
  """The index of the other side's block that a kernel loads for one step of a block's inner loop.

  A skipped step names the block that the next outer block begins with, so that it is loaded early.

  Args:
    block: index of the block of the outer loop.
    step: index of the step of the inner loop.
    start, stop: Ranges, or refs to them.
    last: the largest index that exists.
  """
  index, following = start[block] + step, start[jnp.minimum(block + 1, start.shape[0] - 1)]
  return jnp.minimum(jnp.where(index < stop[block], index, following), last)


def for_key_blocks(
  queries: tuple[Any, Any],
  keys: Edges,
  first: Any,
  count: int,
  compute: Callable[[int, bool], None],
) -> None:
  """Inside a kernel, calls `compute(index, masked)` for a tile's key blocks that are needed.

  If the queries and the tile lie in one segment, all its key blocks are computed without a mask.
  Otherwise those that share a segment with the queries are computed, with a mask.

  Args:
    queries: segment ids of the first and the last query of the block.
    keys: edges of all key blocks of the row.
    first: index of the tile's first key block in the row.
    count: key blocks of a tile.
    compute: its index counts from the tile's first key block.
  """
  begins, ends = keys.first[first], keys.last[first + count - 1]
  one_segment = jnp.minimum(queries[0], begins) == jnp.maximum(queries[1], ends)

  @pl.when(one_segment)
  def _() -> None:
    for index in range(count):
      compute(index, False)

  @pl.when(jnp.logical_not(one_segment))
  def _() -> None:
    for index in range(count):
      shared = (keys.first[first + index] <= queries[1]) & (queries[0] <= keys.last[first + index])
      pl.when(shared)(partial(compute, index, True))


def on_narrowest_grid(
  run: Callable[[int], Any], ids: Int[Array, "n"], block: int, other_block: int
) -> Any:
  """Calls `run(width)` with the smallest of four widths that holds every block's range.

  The width is chosen on the device. A row of fewer than MANY_BLOCKS blocks takes the full width.
  """
  count = math.ceil(len(ids) / other_block)
  if len(ids) // block < MANY_BLOCKS:
    return run(count)
  widths = [math.ceil(count / divisor) for divisor in (1, 2, 4, 8)]
  start, stop = shared_ranges(ids, block, other_block)
  fits = [(stop - start).max() <= width for width in widths[1:]]
  return jax.lax.switch(sum(fits), [partial(run, width) for width in widths])
