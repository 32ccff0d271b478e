"""Attention inside each segment of a packed row, on TPUs, by kernels that skip all other blocks.

Which blocks these are follows from the segment ids as the program runs, so that a packed row costs
what its clips cost.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

from cogvideox_jax.models.attention import CHECKPOINT_NAME
from cogvideox_jax.models.kernels.block_grid import NO_SEGMENT, on_narrowest_grid
from cogvideox_jax.models.kernels.segment_attention_backward import backward
from cogvideox_jax.models.kernels.segment_attention_forward import block_of_keys, forward
from cogvideox_jax.models.kernels.segment_attention_scores import LANES


class Blocks(NamedTuple):
  """How a kernel goes through a row, in tokens, multiples of the lanes."""

  size: int  # Of a block.
  part: int  # Of a block's keys, what is taken, or left out, at a time.


# The most of each, by `device_kind`: benchmarks/README.md has the compiled cycles of which this
# follows.
BLOCKS = {
  "TPU v4": Blocks(1024, 512),
  "TPU v5 lite": Blocks(1024, 512),
  "TPU v5": Blocks(1024, 512),
  "TPU v6 lite": Blocks(1024, 512),
  "TPU7x": Blocks(1024, 512),
}


def attention(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b n heads head_dim"],
  v: Float[Array, "b n heads head_dim"],
  segment_ids: Int[Array, "b n"],
  *,
  blocks: Blocks,
  interpret: bool = False,
) -> Float[Array, "b n heads head_dim"]:
  """Each token attends to all tokens of its own segment, as `attention.attention` has it.

  Rows are taken in turn. What the backward pass needs of the forward one bears CHECKPOINT_NAME.

  Args:
    segment_ids: rising along a row, each segment in one piece, then padding (0).
    blocks: the most that are taken.
    interpret: run as plain JAX operations, on any device, slowly.
  """
  tokens = q.shape[1]
  blocks = fitting(tokens, blocks)
  filling = -tokens % blocks.size
  # Padding sorts after the clips, and our own filling after both.
  ids = jnp.where(segment_ids == 0, NO_SEGMENT - 2, segment_ids)
  ids = jnp.pad(ids, ((0, 0), (0, filling)), constant_values=NO_SEGMENT - 1)

  def by_head(x: Array) -> Array:
    x = jnp.pad(x, ((0, 0), (0, filling), (0, 0), (0, 0)))
    return rearrange(x, "b n heads e -> b heads e n")

  rows = by_head(q), by_head(k), by_head(v), ids
  out = _map(lambda *row: attend_row(*row, blocks, interpret), rows)
  return rearrange(out, "b heads e n -> b n heads e")[:, :tokens]


def _map(function: Callable[..., Array], rows: tuple[Array, ...]) -> Array:
  """`jax.lax.map`, but one row is not copied in and out of a loop."""
  if len(rows[0]) == 1:
    return function(*(x[0] for x in rows))[None]
  return jax.lax.map(lambda row: function(*row), rows)


def fitting(tokens: int, most: Blocks) -> Blocks:
  """The blocks that leave the least of a row of so many tokens to be filled."""
  count = math.ceil(tokens / most.size)
  size = LANES * math.ceil(tokens / count / LANES)
  return Blocks(size, most.part if size % most.part == 0 else size)


class Residuals(NamedTuple):
  """What the backward pass of a row needs."""

  q: Float[Array, "heads head_dim n"]
  k: Float[Array, "heads head_dim n"]
  v: Float[Array, "heads head_dim n"]
  ids: Int[Array, "n"]
  out: Float[Array, "heads head_dim n"]
  log_sum: Float32[Array, "heads n"]  # Logarithm of the sum of exponentiated scores.


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_row(
  q: Float[Array, "heads head_dim n"],
  k: Float[Array, "heads head_dim n"],
  v: Float[Array, "heads head_dim n"],
  ids: Int[Array, "n"],  # Never falling along the row, below NO_SEGMENT.
  blocks: Blocks,
  interpret: bool,
) -> Float[Array, "heads head_dim n"]:
  return _forward(q, k, v, ids, blocks, interpret)[0]


def _forward(
  q: Array, k: Array, v: Array, ids: Array, blocks: Blocks, interpret: bool
) -> tuple[Array, Residuals]:
  run = partial(forward, q, k, v, ids, blocks.size, blocks.part, interpret=interpret)
  keys = block_of_keys(len(ids), blocks.size)
  found = checkpoint_name(on_narrowest_grid(run, ids, blocks.size, keys), CHECKPOINT_NAME)
  return found[0], Residuals(q, k, v, ids, *found)


def _backward(
  blocks: Blocks, interpret: bool, residuals: Residuals, g: Array
) -> tuple[Array, Array, Array, None]:
  run = partial(backward, *residuals, g, blocks.size, blocks.part, interpret=interpret)
  return *on_narrowest_grid(run, residuals.ids, blocks.size, blocks.size), None


attend_row.defvjp(_forward, _backward)
