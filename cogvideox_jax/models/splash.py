"""Attention inside each segment of a packed row, on TPUs: forward by JAX's splash kernel.

The kernel compares segment ids, but it skips a block of scores only where a block grid says so, and
that is made for masks known when compiling. Here the grid is made from the ids of each row as the
program runs, so that a packed row costs what its clips cost. The gradients have a kernel of ours.
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
from cogvideox_jax.models.block_grid import meeting, on_narrowest_grid
from cogvideox_jax.models.splash_backward import LANES, backward

COMPUTE = 512  # Tokens of keys that a kernel takes at a time: more spill registers.
# Two numbers a pair of blocks, of int16 and int8, stand in the scalar memory of 1 MiB.
MOST_PAIRS = 300_000


# How the kernel reads queries, keys and values. With a head's 64 numbers in the lanes half of them
# would stay empty, and what comes before would have to be turned; the kernel takes as long.
TOKENS_IN_LANES = dict.fromkeys(("q_layout", "k_layout", "v_layout"), splash.QKVLayout.SEQ_MINOR)


# The most tokens of a block, by `device_kind`. They follow from the compiled cycles that
# benchmarks/README.md has.
BLOCKS = {"TPU v4": 1024, "TPU v5 lite": 1024, "TPU v5": 1024, "TPU v6 lite": 1024, "TPU7x": 1024}


def attention(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b n heads head_dim"],
  v: Float[Array, "b n heads head_dim"],
  segment_ids: Int[Array, "b n"],
  *,
  block: int,
  interpret: bool = False,
) -> Float[Array, "b n heads head_dim"]:
  """Each token attends to all tokens of its own segment, as `attention.attention` has it.

  Rows are taken in turn. What the backward pass needs of the forward one bears CHECKPOINT_NAME.

  Args:
    segment_ids: rising along a row, each segment in one piece, then padding (0).
    block: the most tokens of a block, a multiple of the lanes.
    interpret: run as plain JAX operations, on any device, slowly.
  """
  tokens, head_dim = q.shape[1], q.shape[-1]
  plan = make_plan(tokens, block)
  filling = plan.tokens - tokens
  last = np.iinfo(np.int32).max  # Sorts padding after the clips, and our own filling after both.
  ids = jnp.where(segment_ids == 0, last - 1, segment_ids)
  ids = jnp.pad(ids, ((0, 0), (0, filling)), constant_values=last)

  def by_head(x: Array) -> Array:
    x = jnp.pad(x, ((0, 0), (0, filling), (0, 0), (0, 0)))
    return rearrange(x, "b n heads e -> b heads e n")

  rows = by_head(q * head_dim**-0.5), by_head(k), by_head(v), ids
  out = _map(lambda *row: attend_row(*row, plan, interpret), rows)
  return rearrange(out, "b heads e n -> b n heads e")[:, :tokens]


def _map(function: Callable[..., Array], rows: tuple[Array, ...]) -> Array:
  """`jax.lax.map`, but one row is not copied in and out of a loop."""
  if len(rows[0]) == 1:
    return function(*(x[0] for x in rows))[None]
  return jax.lax.map(lambda row: function(*row), rows)


class Plan(NamedTuple):
  """How a row is cut."""

  tokens: int  # Its own and the filling, so that the blocks divide it.
  block: int  # Of queries; of keys, too, but in the forward pass of the longest rows.
  block_kv: int
  compute: int  # Tokens of keys that a kernel takes at a time.


def make_plan(tokens: int, block: int) -> Plan:
  """The plan for a row of so many tokens, in blocks of at most `block`.

  Queries and keys are cut alike, but in rows too long for the scalar memory of JAX's kernel.
  """
  count = math.ceil(tokens / block)
  size = LANES * math.ceil(tokens / count / LANES)
  size_kv = size * math.ceil(count**2 / MOST_PAIRS)
  compute = COMPUTE if size % COMPUTE == 0 else size
  return Plan(tokens + -tokens % size_kv, size, size_kv, compute)


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
  plan: Plan,
  interpret: bool,
) -> Float[Array, "heads head_dim n"]:
  return _forward(q, k, v, ids, plan, interpret)[0]


def _forward(
  q: Array, k: Array, v: Array, ids: Array, plan: Plan, interpret: bool
) -> tuple[Array, Residuals]:
  def run(divisor: int) -> Any:
    kernel = splash.SplashAttentionKernel(
      block_grid(ids, plan.block, plan.block_kv, divisor),
      dq_mask_info=None,
      dkv_mask_info=None,
      save_residuals=True,
      residual_checkpoint_name=None,
      block_sizes=splash.BlockSizes(plan.block, plan.block_kv, plan.compute, **TOKENS_IN_LANES),
      is_mqa=False,
      mask_value=splash.DEFAULT_MASK_VALUE,
      attn_logits_soft_cap=None,
      mask_function=None,
      interpret=interpret,
    )
    # Tokens first by name, while TOKENS_IN_LANES has the kernel read them as they lie.
    return kernel(*(x.swapaxes(1, 2) for x in (q, k, v)), splash.SegmentIds(ids, ids))

  out, (log_sum,) = on_narrowest_grid(run, ids, plan.block, plan.block_kv)
  out, log_sum = checkpoint_name((_tokens_last(out), log_sum), CHECKPOINT_NAME)
  return out, Residuals(q, k, v, ids, out, log_sum)


def _backward(
  plan: Plan, interpret: bool, residuals: Residuals, g: Array
) -> tuple[Array, Array, Array, None]:
  def run(divisor: int) -> tuple[Array, Array, Array]:
    return backward(
      *residuals, g, block=plan.block, compute=plan.compute, divisor=divisor, interpret=interpret
    )

  return *on_narrowest_grid(run, residuals.ids, plan.block, plan.block), None


attend_row.defvjp(_forward, _backward)


def _tokens_last(x: Float[Array, "heads n head_dim"]) -> Float[Array, "heads head_dim n"]:
  """The kernel's output, turned, by a product with ones and zeros.

  That is exact, and takes a third of the time of a copy.
  """
  one = jnp.eye(x.shape[2], dtype=x.dtype)
  return jnp.einsum("hne,ef->hfn", x, one, precision=jax.lax.Precision.HIGHEST)


def block_grid(ids: Int[Array, "n"], block_q: int, block_kv: int, divisor: int = 1) -> MaskInfo:
  """Which pairs of blocks hold a common segment, and which block the kernel is to fetch for each.

  Args:
    divisor: of the grid's width, which is that of the row where this is 1. It begins with the first
      block that is met.
  """
  start, stop = meeting(ids, block_q, block_kv)
  at = start[:, None] + jnp.arange(math.ceil(len(ids) // block_kv / divisor))
  meets = at < stop[:, None]
  # A skipped pair has the block of the next pair that is not, so that it is fetched in time.
  after = jnp.append(start[1:], stop[-1] - 1)
  # A mask of 2 leaves single scores to the ids. The numbers of blocks need more than int8.
  return MaskInfo(
    data_next=jnp.where(meets, at, after[:, None])[None].astype(jnp.int16),
    mask_next=None,
    block_mask=2 * meets[None].astype(jnp.int8),
    partial_mask_blocks=None,
    q_sequence=None,
  )
