"""Which blocks of scores a packed row has: those whose queries and keys share a segment.

All is computed from the segment ids as the program runs. They never fall along a row, so the blocks
that hold a block's segments stand together.
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

# Even to skip a pair of blocks takes time, and in rows of this many or more nearly all are skipped:
# there a grid is narrowed to the longest clip.
MANY_BLOCKS = 128
NO_SEGMENT = np.iinfo(np.int32).max  # Of what a last block has beyond the row's end.


class Meeting(NamedTuple):
  """Of each block of one side, the other's blocks [start, stop) that hold a segment of it."""

  start: Int[Array, "blocks"]
  stop: Int[Array, "blocks"]


class Edges(NamedTuple):
  """The segments of the first and of the last token of each part of a row.

  Arrays, or a kernel's references to them.
  """

  first: Any
  last: Any

  def of_block(self, block: Any, parts: int) -> tuple[Any, Any]:
    """The same of a block of so many parts."""
    return self.first[block * parts], self.last[block * parts + parts - 1]


def edges(ids: Int[Array, "n"], part: int, block: int) -> Edges:
  """Of the parts of whole blocks; what the last block lacks is of a segment that none meets."""
  ids = jnp.pad(ids, (0, -len(ids) % block), constant_values=NO_SEGMENT)
  return Edges(ids[::part], ids[part - 1 :: part])


def meeting(ids: Int[Array, "n"], block: int, others: int) -> Meeting:
  """Which blocks of `others` tokens meet each block of `block`, in a row whose ids never fall."""
  one, other = edges(ids, block, block), edges(ids, others, others)
  start = jnp.searchsorted(other.last, one.first, side="left")
  return Meeting(start, jnp.searchsorted(other.first, one.last, side="right"))


def fetched(block: Any, step: Any, start: Any, stop: Any, last: int) -> Any:
  """Which block a kernel is to fetch at a step of a block's loop; start, stop: as of Meeting.

  A step that is skipped has what the next block begins with, so that it is there in time.
  """
  at, following = start[block] + step, start[jnp.minimum(block + 1, start.shape[0] - 1)]
  return jnp.minimum(jnp.where(at < stop[block], at, following), last)


def for_parts(
  queries: tuple[Any, Any],  # The segments of the block's first and last token.
  keys: Edges,
  first: Any,  # The number of the first part of the block of keys.
  parts: int,
  take: Callable[[int, bool], None],
) -> None:
  """Inside a kernel: `take(part, masked)` for the parts of a block of keys that meet the queries.

  Blocks of one segment alone are not masked. The others are, and leave out parts of other segments.
  """
  begins, ends = keys.first[first], keys.last[first + parts - 1]
  alone = jnp.minimum(queries[0], begins) == jnp.maximum(queries[1], ends)

  @pl.when(alone)
  def _() -> None:
    for part in range(parts):
      take(part, False)

  @pl.when(jnp.logical_not(alone))
  def _() -> None:
    for part in range(parts):
      meets = (keys.first[first + part] <= queries[1]) & (queries[0] <= keys.last[first + part])
      pl.when(meets)(partial(take, part, True))


def on_narrowest_grid(
  run: Callable[[int], Any], ids: Int[Array, "n"], block: int, others: int
) -> Any:
  """`run` with the least of some widths that has room for every block's meetings with `others`."""
  count = math.ceil(len(ids) / others)
  if len(ids) // block < MANY_BLOCKS:
    return run(count)
  widths = [math.ceil(count / divisor) for divisor in (1, 2, 4, 8)]
  start, stop = meeting(ids, block, others)
  fits = [(stop - start).max() <= width for width in widths[1:]]
  return jax.lax.switch(sum(fits), [partial(run, width) for width in widths])
