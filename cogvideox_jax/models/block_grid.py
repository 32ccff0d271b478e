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
  """Of each block of an outer loop, the inner blocks [start, stop) that hold a segment of it."""

  start: Int[Array, "outer"]
  stop: Int[Array, "outer"]

  def widest(self) -> Int[Array, ""]:
    """The most inner blocks that one outer block meets."""
    return (self.stop - self.start).max()


def meeting(ids: Int[Array, "n"], outer_size: int, inner_size: int) -> Meeting:
  """How blocks of `outer_size` tokens meet those of `inner_size`."""
  outer, inner = ids.reshape(-1, outer_size), ids.reshape(-1, inner_size)
  start = jnp.searchsorted(inner[:, -1], outer[:, 0], side="left")
  return Meeting(start, jnp.searchsorted(inner[:, 0], outer[:, -1], side="right"))


def on_narrowest_grid(
  run: Callable[[int], Any], ids: Int[Array, "n"], block_q: int, block_kv: int
) -> Any:
  """`run` with the largest divisor of the grid's width that leaves room for every clip."""
  if len(ids) // block_q < MANY_BLOCKS:
    return run(1)
  divisors = (1, 2, 4, 8)
  both = (block_q, block_kv), (block_kv, block_q)
  widest = [(meeting(ids, *sizes).widest(), len(ids) // sizes[1]) for sizes in both]
  fits = [
    jnp.array([width <= math.ceil(whole / divisor) for width, whole in widest]).all()
    for divisor in divisors[1:]
  ]
  return jax.lax.switch(sum(fits), [partial(run, divisor) for divisor in divisors])
