"""Attention inside each segment of a packed row, by JAX's splash kernel for TPUs.

The kernel compares segment ids, but it skips a block of scores only where a block grid says so, and
that is made for masks known when compiling. Here the grid is made from the ids of each row as the
program runs, so that a packed row costs what its clips cost.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Float, Int

from cogvideox_jax.models.attention import CHECKPOINT_NAME

LANES = 128  # Every block is a multiple of the registers' lanes.
# Two numbers a pair of blocks, of int16 and int8, stand in the scalar memory of 1 MiB.
MOST_PAIRS = 300_000


class Chip(NamedTuple):
  """What the kernel may take of one chip."""

  block: int  # The most tokens of a block.
  partial_bytes: int  # The most memory for the fused backward pass's partial gradients.


def attention(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b n heads head_dim"],
  v: Float[Array, "b n heads head_dim"],
  segment_ids: Int[Array, "b n"],
  *,
  chip: Chip,
  interpret: bool = False,
) -> Float[Array, "b n heads head_dim"]:
  """Each token attends to all tokens of its own segment, as `attention.attention` has it.

  Rows are taken in turn. What the backward pass needs of the forward one bears CHECKPOINT_NAME.

  Args:
    segment_ids: rising along a row, each segment in one piece, then padding (0).
    chip: what it runs on.
    interpret: run as plain JAX operations, on any device, slowly.
  """
  tokens, (_, _, heads, head_dim) = q.shape[1], q.shape
  blocks = block_sizes(tokens, heads, head_dim, chip)
  filling = -tokens % np.lcm(blocks.block_q, blocks.block_kv)
  last = np.iinfo(np.int32).max  # Sorts padding after the clips, and our own filling after both.
  ids = jnp.where(segment_ids == 0, last - 1, segment_ids)
  ids = jnp.pad(ids, ((0, 0), (0, filling)), constant_values=last)

  def by_head(x: Array) -> Array:
    x = jnp.pad(x, ((0, 0), (0, filling), (0, 0), (0, 0)))
    return rearrange(x, "b n heads e -> b heads n e")

  def attend(row: tuple[Array, Array, Array, Array]) -> Array:
    q, k, v, ids = row
    return kernel(ids, blocks, interpret)(q, k, v, splash.SegmentIds(ids, ids))

  rows = by_head(q * head_dim**-0.5), by_head(k), by_head(v), ids
  out = jax.lax.map(attend, rows)
  return rearrange(out, "b heads n e -> b n heads e")[:, :tokens]


def block_sizes(tokens: int, heads: int, head_dim: int, chip: Chip) -> splash.BlockSizes:
  """The blocks of a row of so many tokens; they may not divide it.

  Queries and keys are cut alike, but in rows too long for the scalar memory. The backward pass is
  one kernel, of 5 matrix products instead of 7, where its partial gradients fit: a whole gradient
  of the queries for each block of keys.
  """
  size = _block(tokens, chip.block)
  count = -(-tokens // size)
  block_kv = size * -(-(count**2) // MOST_PAIRS)
  partial_bytes = (tokens // block_kv) * tokens * heads * max(head_dim, LANES) * 2
  fused = partial_bytes <= chip.partial_bytes
  return splash.BlockSizes(
    block_q=size,
    block_kv=block_kv,
    block_kv_compute=size,
    block_q_dkv=size,
    block_kv_dkv=block_kv,
    block_kv_dkv_compute=size,
    block_q_dq=None if fused else size,
    block_kv_dq=None if fused else block_kv,
    use_fused_bwd_kernel=fused,
  )


def _block(tokens: int, most: int) -> int:
  """The size that fills up a row with the fewest tokens, of those from half of `most` on."""
  if tokens <= most:
    return LANES * -(-tokens // LANES)
  sizes = range(max(LANES, most // 2), most + 1, LANES)
  return min(sizes, key=lambda size: (-tokens % size, -size))


def kernel(
  ids: Int[Array, "n"], blocks: splash.BlockSizes, interpret: bool
) -> splash.SplashAttentionKernel:
  """The kernel for a row of these ids, which never fall along it."""
  by_query = block_grid(ids, blocks.block_q, blocks.block_kv)
  return splash.SplashAttentionKernel(
    fwd_mask_info=by_query,
    dq_mask_info=None if blocks.use_fused_bwd_kernel else by_query,
    dkv_mask_info=block_grid(ids, blocks.block_q, blocks.block_kv, by_key=True),
    block_sizes=blocks,
    is_mqa=False,
    save_residuals=False,
    mask_value=splash.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name=CHECKPOINT_NAME,
    mask_function=None,
    interpret=interpret,
  )


def block_grid(
  ids: Int[Array, "n"], block_q: int, block_kv: int, *, by_key: bool = False
) -> MaskInfo:
  """Which pairs of blocks hold a common segment, and which block a kernel is to fetch for each.

  by_key: for the kernel that goes through the queries of each block of keys; the others go through
  the keys of each block of queries.
  """
  q, kv = ids.reshape(-1, block_q), ids.reshape(-1, block_kv)
  outer, inner = (kv, q) if by_key else (q, kv)
  # Ids never fall, so the inner blocks that an outer one meets stand side by side.
  start = jnp.searchsorted(inner[:, -1], outer[:, 0], side="left")
  stop = jnp.searchsorted(inner[:, 0], outer[:, -1], side="right")
  at = jnp.arange(len(inner))
  meets = (start[:, None] <= at) & (at < stop[:, None])
  # A skipped pair has the block of the next pair that is not, so that it is fetched in time.
  # The kernel by keys has the other heads in between: there the last block stays.
  after = stop - 1 if by_key else jnp.append(start[1:], stop[-1] - 1)
  fetched = jnp.where(at < stop[:, None], jnp.maximum(at, start[:, None]), after[:, None])
  if by_key:
    meets, fetched = meets.T, fetched.T
  # A mask of 2 leaves single scores to the ids. The numbers of blocks need more than int8.
  return MaskInfo(
    data_next=fetched[None].astype(jnp.int16),
    mask_next=None,
    block_mask=2 * meets[None].astype(jnp.int8),
    partial_mask_blocks=None,
    q_sequence=None,
  )
