"""Full attention inside each segment of a packed row, at the cost of the segments alone.

Blockwise with an online softmax (FlashAttention, arXiv:2205.14135): no array is tokens x tokens, in
either pass. Segments are contiguous, so the blocks that share a segment with a given block are
neighbours; the loops run over these only, however long the row is.
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

from cogvideox_jax.models.rematerialization import ATTENTION

# Measured forward and backward on two CPU cores, with rows of 512 to 2048 tokens and clips of 40 to
# 2048. For long clips XLA multiplies a tile of 16 blocks of queries by two blocks of keys at up to
# twice the rate of a block by a block. For short clips larger tiles waste more on masked pairs. So
# each row takes what suits its clips, while the program runs.
BLOCK = 64
TILE = 16, 2  # Blocks of queries and blocks of keys in a tile.
TILE_GAIN = 1.5  # Tiles may compute this many times the pairs of blocks.
SHORT = 512  # Rows of fewer tokens are not put in tiles.
MASKED = (
  -1e30
)  # The score of a masked pair: far below any other, and finite, so that no NaN arises.


def attention(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b n heads head_dim"],
  v: Float[Array, "b n heads head_dim"],
  segment_ids: Int[Array, "b n"],
) -> Float[Array, "b n heads head_dim"]:
  """Each token attends to all tokens of its segment; scores and sums are float32.

  Rows are independent and computed one after the other; `shard_map` splits a batch over devices.

  segment_ids: rising along a row, each segment in one piece, then padding (0), which attends to
    itself.
  """
  n = q.shape[1]
  tiles, tile = _split(n)
  blocks = tiles * tile
  size = -(-n // blocks)
  last = np.iinfo(np.int32).max  # Padding must sort after the clips, and added tokens after both.
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
  """The number of tiles of queries for a row of n tokens, and the number of blocks in a tile."""
  if n < SHORT:
    return max(1, n // BLOCK), 1
  queries, keys = TILE
  tiles = max(1, round(n / (queries * BLOCK)))
  return tiles, keys * -(-n // (tiles * keys * BLOCK))


class Residuals(NamedTuple):
  """What the backward pass of a row needs of the forward pass."""

  q: Float[Array, "*b blocks heads size head_dim"]
  k: Float[Array, "*b blocks heads size head_dim"]
  v: Float[Array, "*b blocks heads size head_dim"]
  ids: Int[Array, "*b blocks size"]
  out: Float[Array, "*b blocks heads size head_dim"]
  logsumexp: Float32[Array, "*b blocks heads size"]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(
  q: Float[Array, "b blocks heads size head_dim"],  # Scaled.
  k: Float[Array, "b blocks heads size head_dim"],
  v: Float[Array, "b blocks heads size head_dim"],
  ids: Int[Array, "b blocks size"],  # Never falling along a row.
  tile: int,  # Blocks of q in a tile.
) -> Float[Array, "b blocks heads size head_dim"]:
  return _forward(q, k, v, ids, tile)[0]


def _forward(q: Array, k: Array, v: Array, ids: Array, tile: int) -> tuple[Array, Residuals]:
  results = jax.lax.map(lambda row: _in_tiles(_forward_row, tile, row[-1], *row), (q, k, v, ids))
  out, logsumexp = checkpoint_name(results, ATTENTION)
  return out, Residuals(q, k, v, ids, out, logsumexp)


def _backward(tile: int, residuals: Residuals, do: Array) -> tuple[Array, Array, Array, None]:
  dq, dk, dv = jax.lax.map(
    lambda row: _in_tiles(_backward_row, tile, row[0].ids, *row), (residuals, do)
  )
  return dq, dk, dv, None


_blockwise.defvjp(_forward, _backward)


def _in_tiles(
  run: Callable[..., Any], tile: int, ids: Int[Array, "blocks size"], *arrays: Any
) -> Any:
  """`run(q_ids, k_ids, *arrays)`: block by block, or in tiles where that is faster.

  q_ids, k_ids: the row's ids, one line for the queries, or keys, that are computed together.
  """
  if tile == 1:
    return run(ids, ids, *arrays)
  size = ids.shape[1]
  q_ids, k_ids = ids.reshape(-1, tile * size), ids.reshape(-1, TILE[1] * size)
  faster = _pairs(q_ids, k_ids) < TILE_GAIN * _pairs(ids, ids)
  return jax.lax.cond(faster, partial(run, q_ids, k_ids), partial(run, ids, ids), *arrays)


def _pairs(q_ids: Int[Array, "m size"], k_ids: Int[Array, "n other"]) -> Int[Array, ""]:
  """How many pairs of a query and a key are computed, masked ones included."""
  start, stop = _neighbours(q_ids, k_ids)
  return q_ids.shape[1] * k_ids.shape[1] * (stop - start).sum()


def _forward_row(
  q_ids: Int[Array, "m tile"],
  k_ids: Int[Array, "n other"],
  q: Float[Array, "blocks heads size head_dim"],
  k: Float[Array, "blocks heads size head_dim"],
  v: Float[Array, "blocks heads size head_dim"],
  ids: Int[Array, "blocks size"],
) -> tuple[Float[Array, "blocks heads size head_dim"], Float32[Array, "blocks heads size"]]:
  """Returns the row's outputs and the logsumexp of its scores, one tile of q at a time."""
  blocks = len(q)
  q, k, v = _join(q, len(q_ids)), _join(k, len(k_ids)), _join(v, len(k_ids))

  def attend(tile):
    q, q_ids, start, stop = tile

    def add(j, carry):
      acc, l, m_before = carry
      s = jnp.where(q_ids[:, None] == k_ids[j], _product("hqe,hke->hqk", q, k[j]), MASKED)
      m = jnp.maximum(m_before, s.max(-1))
      # Until a query has met a key of its segment, p is 1 for masked pairs. What they add is wiped
      # out later, when it shrinks by exp(MASKED - m).
      p = jnp.exp(s - m[..., None])
      shrink = jnp.exp(m_before - m)
      acc = acc * shrink[..., None] + _product("hqk,hke->hqe", p.astype(v.dtype), v[j])
      return acc, l * shrink + p.sum(-1), m

    # Made from q, so that shard_map knows that they differ between devices as q does.
    acc = jnp.zeros_like(q, dtype=jnp.float32)
    l = jnp.zeros_like(acc[..., 0])
    m = jnp.full_like(l, MASKED)
    acc, l, m = jax.lax.fori_loop(start, stop, add, (acc, l, m))
    return (acc / l[..., None]).astype(q.dtype), m + jnp.log(l)

  out, logsumexp = jax.lax.map(attend, (q, q_ids, *_neighbours(q_ids, k_ids)))
  return _separate(out, blocks), _separate(logsumexp, blocks)


def _backward_row(
  q_ids: Int[Array, "m tile"],
  k_ids: Int[Array, "n other"],
  residuals: Residuals,
  do: Float[Array, "blocks heads size head_dim"],
) -> tuple[
  Float[Array, "blocks heads size head_dim"],
  Float[Array, "blocks heads size head_dim"],
  Float[Array, "blocks heads size head_dim"],
]:
  """Returns the row's dq, dk and dv, one tile of k and v at a time."""
  blocks = len(do)
  q, out, logsumexp, do = (
    _join(x, len(q_ids)) for x in (residuals.q, residuals.out, residuals.logsumexp, do)
  )
  k, v = _join(residuals.k, len(k_ids)), _join(residuals.v, len(k_ids))
  delta = _product("nhqe,nhqe->nhq", do, out)

  def attend(dq, tile):
    k, v, k_ids, start, stop = tile

    def add(i, carry):
      dq, dk, dv = carry
      s = jnp.where(q_ids[i][:, None] == k_ids, _product("hqe,hke->hqk", q[i], k), MASKED)
      p = jnp.exp(s - logsumexp[i][..., None])
      dv += _product("hqk,hqe->hke", p.astype(do.dtype), do[i])
      ds = p * (_product("hqe,hke->hqk", do[i], v) - delta[i][..., None])
      ds = ds.astype(q.dtype)
      dk += _product("hqk,hqe->hke", ds, q[i])
      dq_tile = dq[i] + _product("hqk,hke->hqe", ds, k)
      return jax.lax.dynamic_update_index_in_dim(dq, dq_tile, i, 0), dk, dv

    zeros = jnp.zeros_like(k, dtype=jnp.float32)
    dq, dk, dv = jax.lax.fori_loop(start, stop, add, (dq, zeros, zeros))
    return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

  tiles = k, v, k_ids, *_neighbours(k_ids, q_ids)
  dq, (dk, dv) = jax.lax.scan(attend, jnp.zeros_like(q, dtype=jnp.float32), tiles)
  return _separate(dq.astype(q.dtype), blocks), _separate(dk, blocks), _separate(dv, blocks)


def _neighbours(
  ids: Int[Array, "m size"], others: Int[Array, "n other"]
) -> tuple[Int[Array, "m"], Int[Array, "m"]]:
  """The range [start, stop) of lines of `others` that share a segment with each line of `ids`.

  No ids ever fall, along a line or from one to the next.
  """
  start = jnp.searchsorted(others[:, -1], ids[:, 0], side="left")
  return start, jnp.searchsorted(others[:, 0], ids[:, -1], side="right")


def _join(
  x: Shaped[Array, "blocks heads size *e"], tiles: int
) -> Shaped[Array, "tiles heads t *e"]:
  """Joins blocks into tiles."""
  return rearrange(x, "(tiles group) h size ... -> tiles h (group size) ...", tiles=tiles)


def _separate(
  x: Shaped[Array, "tiles heads t *e"], blocks: int
) -> Shaped[Array, "blocks heads size *e"]:
  """Separates tiles into blocks: the inverse of `_join`."""
  group = blocks // len(x)
  return rearrange(x, "tiles h (group size) ... -> (tiles group) h size ...", group=group)


def _product(formula: str, x: Array, y: Array) -> Array:
  return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)
