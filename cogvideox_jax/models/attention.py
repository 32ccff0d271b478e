"""Full attention inside each segment of a packed row, at the cost of the segments alone.

Blockwise with an online softmax (FlashAttention, arXiv:2205.14135): no array is tokens x tokens,
forward or backward. Segments are contiguous, so the blocks that can meet a given block stand side
by side; the loops run over these only, however long the row.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int, Shaped

# Measured forward and backward on two CPU cores, 512 to 2048 tokens, clips of 40 to 2048. Where
# clips are long, XLA multiplies a tile of 16 blocks of queries with two blocks of keys at up to
# twice the rate of a block with a block; where they are short, larger parts waste more on the pairs
# that they mask. So each row takes what suits its clips, at run time.
BLOCK = 64
TILE = 16, 2  # Blocks of queries, of keys.
TILE_GAIN = 1.5
SHORT = 512  # A row of fewer tokens has no tiles.
CHECKPOINT_NAME = "attention"  # Of what a rematerialization policy may save: out and log_sum.
MASKED = -1e30  # A score that no real one comes near, finite so that no NaN can arise.


def attention(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b n heads head_dim"],
  v: Float[Array, "b n heads head_dim"],
  segment_ids: Int[Array, "b n"],
) -> Float[Array, "b n heads head_dim"]:
  """Each token attends to all tokens of its own segment; scores and sums are float32.

  segment_ids: rising along a row, each segment in one piece, then padding (0), which attends to
  itself. Rows are independent and taken in turn: split a batch over devices with `shard_map`.
  """
  n = q.shape[1]
  tiles, tile = _split(n)
  blocks = tiles * tile
  size = -(-n // blocks)
  last = np.iinfo(np.int32).max  # Sorts padding after the clips, and our own filling after both.
  ids = jnp.where(segment_ids == 0, last - 1, segment_ids)
  ids = jnp.pad(ids, ((0, 0), (0, blocks * size - n)), constant_values=last)

  def split(x: Array) -> Array:
    x = jnp.pad(x, ((0, 0), (0, blocks * size - n), (0, 0), (0, 0)))
    return rearrange(x, "b (blocks size) heads e -> b blocks heads size e", blocks=blocks)

  scaled = q * q.shape[-1] ** -0.5
  ids = ids.reshape(-1, blocks, size)
  out = cast(Array, _blockwise(split(scaled), split(k), split(v), ids, tile))
  return rearrange(out, "b blocks heads size e -> b (blocks size) heads e")[:, :n]


def _split(n: int) -> tuple[int, int]:
  """How many tiles of queries a row of n tokens may be taken in, and how many blocks a tile is."""
  if n < SHORT:
    return max(1, n // BLOCK), 1
  queries, keys = TILE
  tiles = max(1, round(n / (queries * BLOCK)))
  return tiles, keys * -(-n // (tiles * keys * BLOCK))


class Residuals(NamedTuple):
  """What the backward pass of a row needs."""

  q: Float[Array, "*b blocks heads size head_dim"]
  k: Float[Array, "*b blocks heads size head_dim"]
  v: Float[Array, "*b blocks heads size head_dim"]
  ids: Int[Array, "*b blocks size"]
  out: Float[Array, "*b blocks heads size head_dim"]
  log_sum: Float32[Array, "*b blocks heads size"]  # Logarithm of the sum of exponentiated scores.


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(
  q: Float[Array, "b blocks heads size head_dim"],  # Scaled.
  k: Float[Array, "b blocks heads size head_dim"],
  v: Float[Array, "b blocks heads size head_dim"],
  ids: Int[Array, "b blocks size"],  # Never falling along a row.
  tile: int,  # How many blocks of q may be taken together.
) -> Float[Array, "b blocks heads size head_dim"]:
  return _forward(q, k, v, ids, tile)[0]


def _forward(q: Array, k: Array, v: Array, ids: Array, tile: int) -> tuple[Array, Residuals]:
  found = jax.lax.map(lambda row: _in_tiles(_forward_row, tile, row[-1], *row), (q, k, v, ids))
  out, log_sum = checkpoint_name(found, CHECKPOINT_NAME)
  return out, Residuals(q, k, v, ids, out, log_sum)


def _backward(tile: int, residuals: Residuals, g: Array) -> tuple[Array, Array, Array, None]:
  dq, dk, dv = jax.lax.map(
    lambda row: _in_tiles(_backward_row, tile, row[0].ids, *row), (residuals, g)
  )
  return dq, dk, dv, None


_blockwise.defvjp(_forward, _backward)


def _in_tiles(
  run: Callable[..., Any], tile: int, ids: Int[Array, "blocks size"], *arrays: Any
) -> Any:
  """`run(tile_ids, key_ids, *arrays)`: block by block, or in tiles where that is quicker.

  tile_ids, key_ids: the row's ids, as its queries and its keys are to be taken together.
  """
  if tile == 1:
    return run(ids, ids, *arrays)
  size = ids.shape[1]
  queries, keys = ids.reshape(-1, tile * size), ids.reshape(-1, TILE[1] * size)
  quicker = _pairs(queries, keys) < TILE_GAIN * _pairs(ids, ids)
  return jax.lax.cond(quicker, partial(run, queries, keys), partial(run, ids, ids), *arrays)


def _pairs(queries: Int[Array, "m size"], keys: Int[Array, "n other"]) -> Int[Array, ""]:
  """How many pairs of a query and a key are computed, those that are masked among them."""
  start, stop = _neighbours(queries, keys)
  return queries.shape[1] * keys.shape[1] * (stop - start).sum()


def _forward_row(
  q_ids: Int[Array, "m tile"],
  k_ids: Int[Array, "n other"],
  q: Float[Array, "blocks heads size head_dim"],
  k: Float[Array, "blocks heads size head_dim"],
  v: Float[Array, "blocks heads size head_dim"],
  ids: Int[Array, "blocks size"],
) -> tuple[Float[Array, "blocks heads size head_dim"], Float32[Array, "blocks heads size"]]:
  """Returns the row's output and the logarithms of its softmax sums, one tile of q at a time."""
  blocks = len(q)
  q, k, v = _join(q, len(q_ids)), _join(k, len(k_ids)), _join(v, len(k_ids))

  def attend(tile):
    q, q_ids, start, stop = tile

    def add(j, carry):
      total, weight, top = carry
      score = jnp.where(q_ids[:, None] == k_ids[j], _product("hqe,hke->hqk", q, k[j]), MASKED)
      new_top = jnp.maximum(top, score.max(-1))
      # While a token has met nothing of its segment this is 1 for masked pairs; the shrinking by
      # exp(MASKED - top) then wipes them out.
      exp = jnp.exp(score - new_top[..., None])
      shrink = jnp.exp(top - new_top)
      total = total * shrink[..., None] + _product("hqk,hke->hqe", exp.astype(v.dtype), v[j])
      return total, weight * shrink + exp.sum(-1), new_top

    # Made like q, so that shard_map knows that they differ between devices as q does.
    total = jnp.zeros_like(q, dtype=jnp.float32)
    weight = jnp.zeros_like(total[..., 0])
    top = jnp.full_like(weight, MASKED)
    total, weight, top = jax.lax.fori_loop(start, stop, add, (total, weight, top))
    return (total / weight[..., None]).astype(q.dtype), top + jnp.log(weight)

  out, log_sum = jax.lax.map(attend, (q, q_ids, *_neighbours(q_ids, k_ids)))
  return _part(out, blocks), _part(log_sum, blocks)


def _backward_row(
  q_ids: Int[Array, "m tile"],
  k_ids: Int[Array, "n other"],
  residuals: Residuals,
  g: Float[Array, "blocks heads size head_dim"],
) -> tuple[
  Float[Array, "blocks heads size head_dim"],
  Float[Array, "blocks heads size head_dim"],
  Float[Array, "blocks heads size head_dim"],
]:
  """Returns the gradients of the row's q, k and v, one tile of k and v at a time."""
  blocks = len(g)
  q, out, log_sum, g = (
    _join(x, len(q_ids)) for x in (residuals.q, residuals.out, residuals.log_sum, g)
  )
  k, v = _join(residuals.k, len(k_ids)), _join(residuals.v, len(k_ids))
  drift = _product("nhqe,nhqe->nhq", g, out)

  def attend(dq, tile):
    k, v, k_ids, start, stop = tile

    def add(i, carry):
      dq, dk, dv = carry
      score = jnp.where(q_ids[i][:, None] == k_ids, _product("hqe,hke->hqk", q[i], k), MASKED)
      weight = jnp.exp(score - log_sum[i][..., None])
      dv += _product("hqk,hqe->hke", weight.astype(g.dtype), g[i])
      slope = weight * (_product("hqe,hke->hqk", g[i], v) - drift[i][..., None])
      slope = slope.astype(q.dtype)
      dk += _product("hqk,hqe->hke", slope, q[i])
      dq_tile = dq[i] + _product("hqk,hke->hqe", slope, k)
      return jax.lax.dynamic_update_index_in_dim(dq, dq_tile, i, 0), dk, dv

    zeros = jnp.zeros_like(k, dtype=jnp.float32)
    dq, dk, dv = jax.lax.fori_loop(start, stop, add, (dq, zeros, zeros))
    return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

  tiles = k, v, k_ids, *_neighbours(k_ids, q_ids)
  dq, (dk, dv) = jax.lax.scan(attend, jnp.zeros_like(q, dtype=jnp.float32), tiles)
  return _part(dq.astype(q.dtype), blocks), _part(dk, blocks), _part(dv, blocks)


def _neighbours(
  ids: Int[Array, "m size"], others: Int[Array, "n other"]
) -> tuple[Int[Array, "m"], Int[Array, "m"]]:
  """Which of the others, [start, stop), hold a segment of each of the first. No ids ever fall."""
  start = jnp.searchsorted(others[:, -1], ids[:, 0], side="left")
  return start, jnp.searchsorted(others[:, 0], ids[:, -1], side="right")


def _join(
  x: Shaped[Array, "blocks heads size *e"], tiles: int
) -> Shaped[Array, "tiles heads t *e"]:
  return rearrange(x, "(tiles group) h size ... -> tiles h (group size) ...", tiles=tiles)


def _part(
  x: Shaped[Array, "tiles heads t *e"], blocks: int
) -> Shaped[Array, "blocks heads size *e"]:
  group = blocks // len(x)
  return rearrange(x, "tiles h (group size) ... -> (tiles group) h size ...", group=group)


def _product(formula: str, x: Array, y: Array) -> Array:
  return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)
