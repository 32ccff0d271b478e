"""Attention inside each segment of a packed row, by JAX's splash kernel for TPUs.

The kernel compares segment ids, but it skips a block of scores only where a block grid says so, and
that is made for masks known when compiling. Here the grid is made from the ids of each row as the
program runs, so that a packed row costs what its clips cost.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Float, Float32, Int

from cogvideox_jax.models.attention import CHECKPOINT_NAME

LANES = 128  # Every block is a multiple of the registers' lanes.
# Even to skip a pair of blocks takes time, and in rows of this many or more nearly all are skipped:
# there the grid is narrowed to the longest clip.
MANY_BLOCKS = 128
# Adding up the partial gradients of a fused backward pass grows with the square of a row, of which
# packed rows run a small part: on a v5p it takes 16 ms of a layer of 25,600 tokens and saves 9, and
# 8 of one of 17,776, of one clip, and saves 21.
MOST_FUSED = 20_480
COMPUTE = 512  # Tokens of keys that a kernel takes at a time: more spill registers.
# Two numbers a pair of blocks, of int16 and int8, stand in the scalar memory of 1 MiB.
MOST_PAIRS = 300_000


# How the kernels read queries, keys and values. With a head's 64 numbers in the lanes half of them
# would stay empty, and what comes before would have to be turned; the kernels take as long.
TOKENS_IN_LANES = dict.fromkeys(("q_layout", "k_layout", "v_layout"), splash.QKVLayout.SEQ_MINOR)


class Chip(NamedTuple):
  """What the kernel may take of one chip."""

  block: int  # The most tokens of a block.
  partial_bytes: int  # The most memory for the partial gradients of a fused backward pass.


# By `device_kind`. benchmarks/README.md has the compiled cycles from which the blocks follow; the
# memory is a thirty-second of a device's.
CHIPS = {
  "TPU v4": Chip(block=1024, partial_bytes=2**30),
  "TPU v5 lite": Chip(block=1024, partial_bytes=2**29),
  "TPU v5": Chip(block=1024, partial_bytes=3 * 2**30),
  "TPU v6 lite": Chip(block=1024, partial_bytes=2**30),
  "TPU7x": Chip(block=1024, partial_bytes=3 * 2**30),
}


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
  _, tokens, heads, head_dim = q.shape
  plan = make_plan(tokens, heads, chip)
  filling = plan.tokens - tokens
  last = np.iinfo(np.int32).max  # Sorts padding after the clips, and our own filling after both.
  ids = jnp.where(segment_ids == 0, last - 1, segment_ids)
  ids = jnp.pad(ids, ((0, 0), (0, filling)), constant_values=last)

  def by_head(x: Array) -> Array:
    x = jnp.pad(x, ((0, 0), (0, filling), (0, 0), (0, 0)))
    return rearrange(x, "b n (groups heads) e -> (b groups) heads e n", groups=plan.groups)

  parts = by_head(q * head_dim**-0.5), by_head(k), by_head(v), jnp.repeat(ids, plan.groups, 0)
  out = _map(lambda *part: attend_row(*part, plan.blocks, interpret), parts)
  out = rearrange(out, "(b groups) heads e n -> b n (groups heads) e", groups=plan.groups)
  return out[:, :tokens]


def _map(function: Callable[..., Array], parts: tuple[Array, ...]) -> Array:
  """`jax.lax.map`, but one part is not copied in and out of a loop."""
  if len(parts[0]) == 1:
    return function(*(x[0] for x in parts))[None]
  return jax.lax.map(lambda part: function(*part), parts)


class Plan(NamedTuple):
  """How a row is cut."""

  tokens: int  # Its own and the filling, so that the blocks divide it.
  groups: int  # Of heads, taken in turn.
  blocks: splash.BlockSizes


def make_plan(tokens: int, heads: int, chip: Chip) -> Plan:
  """The plan for a row of so many tokens.

  Queries and keys are cut alike, but in rows too long for the scalar memory. The backward pass of
  short rows is one kernel, of 5 matrix products instead of 7. It leaves a whole gradient of the
  queries for each block of keys: these blocks are twice as long, and heads are taken in groups as
  large as their partial gradients fit.
  """
  count = math.ceil(tokens / chip.block)
  size = LANES * math.ceil(tokens / count / LANES)
  size_kv = size * math.ceil(count**2 / MOST_PAIRS)
  compute = COMPUTE if size % COMPUTE == 0 else size
  groups = _groups(tokens, heads, 2 * size, chip) if tokens <= MOST_FUSED else 0
  size_dkv = min(2, count) * size if groups else size_kv
  blocks = splash.BlockSizes(
    block_q=size,
    block_kv=size_kv,
    block_kv_compute=compute,
    block_q_dkv=size,
    block_kv_dkv=size_dkv,
    block_kv_dkv_compute=compute,
    block_q_dq=None if groups else size,
    block_kv_dq=None if groups else size_kv,
    use_fused_bwd_kernel=groups > 0,
    **TOKENS_IN_LANES,
  )
  return Plan(tokens + -tokens % size_dkv, max(1, groups), blocks)


def _groups(tokens: int, heads: int, block_kv: int, chip: Chip) -> int:
  """The fewest groups of heads whose partial gradients fit; 0 if those of one do not."""
  head_bytes = 2 * LANES * tokens * math.ceil(tokens / block_kv)  # 64 numbers take all lanes, too.
  groups = (groups for groups in range(1, heads + 1) if heads % groups == 0)
  return next((n for n in groups if heads // n * head_bytes <= chip.partial_bytes), 0)


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
  q: Float[Array, "heads head_dim n"],  # Scaled.
  k: Float[Array, "heads head_dim n"],
  v: Float[Array, "heads head_dim n"],
  ids: Int[Array, "n"],  # Never falling along the row.
  blocks: splash.BlockSizes,
  interpret: bool,
) -> Float[Array, "heads head_dim n"]:
  return _forward(q, k, v, ids, blocks, interpret)[0]


def _forward(
  q: Array, k: Array, v: Array, ids: Array, blocks: splash.BlockSizes, interpret: bool
) -> tuple[Array, Residuals]:
  def run(divisor: int) -> Any:
    kernel = splash.SplashAttentionKernel(
      block_grid(ids, blocks.block_q, blocks.block_kv, divisor),
      dq_mask_info=None,
      dkv_mask_info=None,
      save_residuals=True,
      residual_checkpoint_name=None,
      **_options(blocks, interpret),
    )
    return kernel(*_as_kernels_take(q, k, v), splash.SegmentIds(ids, ids))

  out, (log_sum,) = _on_narrowest_grid(run, ids, blocks)
  out, log_sum = checkpoint_name((_tokens_last(out), log_sum), CHECKPOINT_NAME)
  return out, Residuals(q, k, v, ids, out, log_sum)


def _backward(
  blocks: splash.BlockSizes, interpret: bool, residuals: Residuals, g: Array
) -> tuple[Array, Array, Array, None]:
  q, k, v, ids, out, log_sum = residuals
  fused, block_kv = blocks.use_fused_bwd_kernel, blocks.block_kv_dkv or blocks.block_kv
  out, g = _tokens_first(out), _tokens_first(g)

  def run(divisor: int) -> tuple[Array, Array, Array]:
    by_query = None if fused else block_grid(ids, blocks.block_q, blocks.block_kv, divisor)
    by_key = block_grid(ids, blocks.block_q, block_kv, divisor, by_key=True, whole=fused)
    ids_of_both = splash.SegmentIds(ids, ids)
    # JAX has no public name for the backward pass without the forward one.
    grads = splash._splash_attention_bwd(
      save_residuals=False,
      residual_checkpoint_name=None,
      res=(*_as_kernels_take(q, k, v), ids_of_both, None, out, log_sum, by_query, by_key),
      do=g,
      **_options(blocks, interpret),
    )
    return grads[3], grads[4], grads[5]

  dq, dk, dv = _on_narrowest_grid(run, ids, blocks)
  return _tokens_last(dq), _tokens_last(dk), _tokens_last(dv), None


attend_row.defvjp(_forward, _backward)


def _as_kernels_take(*arrays: Float[Array, "heads head_dim n"]) -> list[Any]:
  """Tokens first by name, while TOKENS_IN_LANES has the kernels read them as they lie."""
  return [x.swapaxes(1, 2) for x in arrays]


# What kernels give has tokens first in memory, too. To turn it is a product with ones and zeros,
# which is exact, and takes a third of the time of a copy.
def _tokens_last(x: Float[Array, "heads n head_dim"]) -> Float[Array, "heads head_dim n"]:
  return _times_one("hne,ef->hfn", x, x.shape[2])


def _tokens_first(x: Float[Array, "heads head_dim n"]) -> Float[Array, "heads n head_dim"]:
  return _times_one("hen,ef->hnf", x, x.shape[1])


def _times_one(product: str, x: Array, head_dim: int) -> Array:
  one = jnp.eye(head_dim, dtype=x.dtype)
  return jnp.einsum(product, x, one, precision=jax.lax.Precision.HIGHEST)


def _options(blocks: splash.BlockSizes, interpret: bool) -> dict[str, Any]:
  return {
    "block_sizes": blocks,
    "is_mqa": False,
    "mask_value": splash.DEFAULT_MASK_VALUE,
    "attn_logits_soft_cap": None,
    "mask_function": None,
    "interpret": interpret,
  }


def _on_narrowest_grid(run: Callable[[int], Any], ids: Array, blocks: splash.BlockSizes) -> Any:
  """`run` with the largest divisor of the grid's width that leaves room for every clip."""
  q, kv = ids.reshape(-1, blocks.block_q), ids.reshape(-1, blocks.block_kv)
  divisors = (1, 2, 4, 8) if len(q) >= MANY_BLOCKS else (1,)
  met = {len(inner): _meeting(outer, inner) for outer, inner in ((q, kv), (kv, q))}
  fits = [
    jnp.array([(stop - start).max() <= math.ceil(n / d) for n, (start, stop) in met.items()]).all()
    for d in divisors
  ]
  return jax.lax.switch(sum(fits[1:]), [partial(run, divisor) for divisor in divisors])


def block_grid(
  ids: Int[Array, "n"],
  block_q: int,
  block_kv: int,
  divisor: int = 1,
  *,
  by_key: bool = False,
  whole: bool = False,
) -> MaskInfo:
  """Which pairs of blocks hold a common segment, and which block a kernel is to fetch for each.

  Args:
    divisor: of the grid's width, which is that of the row where this is 1. It begins with the first
      block that is met.
    by_key: for the kernel that goes through the queries of each block of keys; the others go
      through the keys of each block of queries.
    whole: the grid begins with the row and is as wide.
  """
  q, kv = ids.reshape(-1, block_q), ids.reshape(-1, block_kv)
  outer, inner = (kv, q) if by_key else (q, kv)
  start, stop = _meeting(outer, inner)
  if whole:
    at = jnp.broadcast_to(jnp.arange(len(inner)), (len(outer), len(inner)))
  else:
    at = start[:, None] + jnp.arange(math.ceil(len(inner) / divisor))
  meets = (start[:, None] <= at) & (at < stop[:, None])
  # A skipped pair has the block of the next pair that is not, so that it is fetched in time. The
  # kernel by keys has the other heads in between: there the last block stays.
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


def _meeting(
  outer: Int[Array, "outer size"], inner: Int[Array, "inner size2"]
) -> tuple[Int[Array, "outer"], Int[Array, "outer"]]:
  """The inner blocks [start, stop) that hold a segment of each outer one. The ids never fall."""
  start = jnp.searchsorted(inner[:, -1], outer[:, 0], side="left")
  return start, jnp.searchsorted(inner[:, 0], outer[:, -1], side="right")
