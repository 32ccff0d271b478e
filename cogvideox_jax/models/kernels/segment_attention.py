"""Attention inside each segment of a packed row, by kernels for TPUs.

The kernels skip all pairs of blocks that share no segment. Which these are follows from the segment
ids while the program runs, so that a packed row costs what its clips cost.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cogvideox_jax.models.kernels.block_grid import (
  NO_SEGMENT,
  BlockSizes,
  fit_blocks,
  on_narrowest_grid,
)
from cogvideox_jax.models.kernels.segment_attention_backward import Residuals, backward
from cogvideox_jax.models.kernels.segment_attention_forward import forward, key_tile
from cogvideox_jax.models.rematerialization import ATTENTION

# The largest sizes by `device_kind`, from the compiled cycles in benchmarks/attention.md.
BLOCK_SIZES = {
  "TPU v4": BlockSizes(1024, 512),
  "TPU v5 lite": BlockSizes(1024, 512),
  "TPU v5": BlockSizes(1024, 512),
  "TPU v6 lite": BlockSizes(1024, 512),
  "TPU7x": BlockSizes(1024, 512),
}


def attention(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b n heads head_dim"],
  v: Float[Array, "b n heads head_dim"],
  segment_ids: Int[Array, "b n"],
  *,
  sizes: BlockSizes,
  interpret: bool = False,
) -> Float[Array, "b n heads head_dim"]:
  """Each token attends to all tokens of its segment, as in `models/attention.py`.

  Rows are computed one after the other. The results that the backward pass needs are named
  ATTENTION for `rematerialization`.

  Args:
    segment_ids: rising along a row, each segment in one piece, then padding (0).
    sizes: the largest that may be used; a short row uses smaller ones.
    interpret: run as plain JAX operations, on any device, slowly.
  """
  tokens = q.shape[1]
  sizes = fit_blocks(tokens, sizes)
  added = -tokens % sizes.block
  # Padding must sort after the clips, and the tokens that are added here after both.
  ids = jnp.where(segment_ids == 0, NO_SEGMENT - 2, segment_ids)
  ids = jnp.pad(ids, ((0, 0), (0, added)), constant_values=NO_SEGMENT - 1)

  def by_head(x: Array) -> Array:
    x = jnp.pad(x, ((0, 0), (0, added), (0, 0), (0, 0)))
    return rearrange(x, "b n heads e -> b heads e n")

  rows = by_head(q), by_head(k), by_head(v), ids
  out = _map_rows(lambda *row: attend_row(*row, sizes, interpret), rows)
  return rearrange(out, "b heads e n -> b n heads e")[:, :tokens]


def _map_rows(function: Callable[..., Array], rows: tuple[Array, ...]) -> Array:
  """`jax.lax.map`, but without a loop for one row, because a loop would copy it in and out."""
  if len(rows[0]) == 1:
    return function(*(x[0] for x in rows))[None]
  return jax.lax.map(lambda row: function(*row), rows)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_row(
  q: Float[Array, "heads head_dim n"],
  k: Float[Array, "heads head_dim n"],
  v: Float[Array, "heads head_dim n"],
  ids: Int[Array, "n"],
  sizes: BlockSizes,
  interpret: bool,
) -> Float[Array, "heads head_dim n"]:
  """The attention of one row; ids never fall along it and are below NO_SEGMENT."""
  return _forward(q, k, v, ids, sizes, interpret)[0]


def _forward(
  q: Array, k: Array, v: Array, ids: Array, sizes: BlockSizes, interpret: bool
) -> tuple[Array, Residuals]:
  run = partial(forward, q, k, v, ids, sizes, interpret=interpret)
  results = on_narrowest_grid(run, ids, sizes.block, key_tile(len(ids), sizes.block))
  out, logsumexp = checkpoint_name(results, ATTENTION)
  return out, Residuals(q, k, v, ids, out, logsumexp)


def _backward(
  sizes: BlockSizes, interpret: bool, residuals: Residuals, do: Array
) -> tuple[Array, Array, Array, None]:
  run = partial(backward, residuals, do, sizes, interpret=interpret)
  return *on_narrowest_grid(run, residuals.ids, sizes.block, sizes.block), None


attend_row.defvjp(_forward, _backward)
