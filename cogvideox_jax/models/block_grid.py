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
from jaxtyping import Array, Int

# Even to skip a pair of blocks takes time, and in rows of this many or more nearly all are skipped:
# there a grid is narrowed to the longest clip.
MANY_BLOCKS = 128


class Meeting(NamedTuple):
  """Of each block of queries, the blocks of keys [start, stop) that hold a segment of it.

  And the other way round, since both are cut alike.
  """

  start: Int[Array, "blocks"]
  stop: Int[Array, "blocks"]


def meeting(ids: Int[Array, "n"], block: int) -> Meeting:
  """Which blocks of `block` tokens meet, in a row whose ids never fall."""
  first, last = ids[::block], ids[block - 1 :: block]
  start = jnp.searchsorted(last, first, side="left")
  return Meeting(start, jnp.searchsorted(first, last, side="right"))


def fetched(block: Any, step: Any, start: Any, stop: Any) -> Any:
  """Which block a kernel is to fetch at a step of a block's loop; start, stop: as of Meeting.

  A step that is skipped has what the next block begins with, so that it is there in time.
  """
  last = start.shape[0] - 1
  at, following = start[block] + step, start[jnp.minimum(block + 1, last)]
  return jnp.minimum(jnp.where(at < stop[block], at, following), last)


def on_narrowest_grid(run: Callable[[int], Any], ids: Int[Array, "n"], block: int) -> Any:
  """`run` with the least of some widths that has room for every block's meetings."""
  blocks = len(ids) // block
  if blocks < MANY_BLOCKS:
    return run(blocks)
  widths = [math.ceil(blocks / divisor) for divisor in (1, 2, 4, 8)]
  start, stop = meeting(ids, block)
  fits = [(stop - start).max() <= width for width in widths[1:]]
  return jax.lax.switch(sum(fits), [partial(run, width) for width in widths])
