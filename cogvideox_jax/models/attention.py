"""Full attention inside each segment of a packed row, at the cost of the segments alone.

Blockwise with an online softmax (FlashAttention, arXiv:2205.14135): no array is tokens x tokens,
forward or backward. Segments are contiguous, so the blocks that can meet a given block stand side
by side; the loops run over these only, however long the row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

# Measured forward and backward on two CPU cores, 512 to 2048 tokens, clips of 40 to 2048: larger
# blocks waste more on the pairs that they mask, and their scores leave the cache.
BLOCK = 64
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
  blocks = max(1, n // BLOCK)
  size = -(-n // blocks)
  last = np.iinfo(np.int32).max  # Sorts padding after the clips, and our own filling after both.
  ids = jnp.where(segment_ids == 0, last - 1, segment_ids)
  ids = jnp.pad(ids, ((0, 0), (0, blocks * size - n)), constant_values=last)

  def split(x: Array) -> Array:
    x = jnp.pad(x, ((0, 0), (0, blocks * size - n), (0, 0), (0, 0)))
    return rearrange(x, "b (blocks size) heads e -> b blocks heads size e", blocks=blocks)

  out = _blockwise(
    split(q * q.shape[-1] ** -0.5), split(k), split(v), ids.reshape(-1, blocks, size)
  )
  return rearrange(out, "b blocks heads size e -> b (blocks size) heads e")[:, :n]


class Residuals(NamedTuple):
  """What the backward pass of a row needs."""

  q: Float[Array, "*b blocks heads size head_dim"]
  k: Float[Array, "*b blocks heads size head_dim"]
  v: Float[Array, "*b blocks heads size head_dim"]
  ids: Int[Array, "*b blocks size"]
  out: Float[Array, "*b blocks heads size head_dim"]
  log_sum: Float32[Array, "*b blocks heads size"]  # Logarithm of the sum of exponentiated scores.


@jax.custom_vjp
def _blockwise(
  q: Float[Array, "b blocks heads size head_dim"],  # Scaled.
  k: Float[Array, "b blocks heads size head_dim"],
  v: Float[Array, "b blocks heads size head_dim"],
  ids: Int[Array, "b blocks size"],  # Never falling along a row.
) -> Float[Array, "b blocks heads size head_dim"]:
  return _forward(q, k, v, ids)[0]


def _forward(q: Array, k: Array, v: Array, ids: Array) -> tuple[Array, Residuals]:
  found = jax.lax.map(lambda row: _forward_row(*row), (q, k, v, ids))
  out, log_sum = checkpoint_name(found, CHECKPOINT_NAME)
  return out, Residuals(q, k, v, ids, out, log_sum)


def _backward(residuals: Residuals, g: Array) -> tuple[Array, Array, Array, None]:
  dq, dk, dv = jax.lax.map(lambda row: _backward_row(*row), (residuals, g))
  return dq, dk, dv, None


_blockwise.defvjp(_forward, _backward)


def _forward_row(
  q: Float[Array, "blocks heads size head_dim"],
  k: Float[Array, "blocks heads size head_dim"],
  v: Float[Array, "blocks heads size head_dim"],
  ids: Int[Array, "blocks size"],
) -> tuple[Float[Array, "blocks heads size head_dim"], Float32[Array, "blocks heads size"]]:
  """Returns the row's output and the logarithms of its softmax sums, one block of q at a time."""

  def attend(block):
    q, q_ids, start, stop = block

    def add(j, carry):
      total, weight, top = carry
      score = jnp.where(q_ids[:, None] == ids[j], _product("hqe,hke->hqk", q, k[j]), MASKED)
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

  return jax.lax.map(attend, (q, ids, *_neighbours(ids)))


def _backward_row(
  residuals: Residuals, g: Float[Array, "blocks heads size head_dim"]
) -> tuple[
  Float[Array, "blocks heads size head_dim"],
  Float[Array, "blocks heads size head_dim"],
  Float[Array, "blocks heads size head_dim"],
]:
  """Returns the gradients of the row's q, k and v, one block of k and v at a time."""
  q, k, v, ids, out, log_sum = residuals
  drift = _product("nhqe,nhqe->nhq", g, out)

  def attend(dq, block):
    k, v, k_ids, start, stop = block

    def add(i, carry):
      dq, dk, dv = carry
      score = jnp.where(ids[i][:, None] == k_ids, _product("hqe,hke->hqk", q[i], k), MASKED)
      weight = jnp.exp(score - log_sum[i][..., None])
      dv += _product("hqk,hqe->hke", weight.astype(g.dtype), g[i])
      slope = weight * (_product("hqe,hke->hqk", g[i], v) - drift[i][..., None])
      slope = slope.astype(q.dtype)
      dk += _product("hqk,hqe->hke", slope, q[i])
      dq_block = dq[i] + _product("hqk,hke->hqe", slope, k)
      return jax.lax.dynamic_update_index_in_dim(dq, dq_block, i, 0), dk, dv

    zeros = jnp.zeros_like(k, dtype=jnp.float32)
    dq, dk, dv = jax.lax.fori_loop(start, stop, add, (dq, zeros, zeros))
    return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

  dq, (dk, dv) = jax.lax.scan(
    attend, jnp.zeros_like(q, dtype=jnp.float32), (k, v, ids, *_neighbours(ids))
  )
  return dq.astype(q.dtype), dk, dv


def _neighbours(
  ids: Int[Array, "blocks size"],
) -> tuple[Int[Array, "blocks"], Int[Array, "blocks"]]:
  """The blocks [start, stop) that hold a segment of this block. The ids never fall."""
  first, last = ids[:, 0], ids[:, -1]
  start = jnp.searchsorted(last, first, side="left")
  return start, jnp.searchsorted(first, last, side="right")


def _product(formula: str, x: Array, y: Array) -> Array:
  return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)
