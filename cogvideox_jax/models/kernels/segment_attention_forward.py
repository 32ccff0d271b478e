"""Attention inside each segment of a packed row: the forward kernel for TPUs.

It differs from JAX's splash attention, which takes twice as long for heads of 64 on newer chips, in
two ways: tokens lie along the lanes, so that products fill the matrix unit and a number per query
is a row; and where no score of a head can be large, the running maximum is left out.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int

from cogvideox_jax.models.kernels.block_grid import (
  BlockSizes,
  Edges,
  block_edges,
  block_to_load,
  for_key_blocks,
  shared_ranges,
)
from cogvideox_jax.models.kernels.segment_attention_scores import (
  MASKED,
  NN,
  SUBLANES,
  over_sublanes,
  product,
  scaled,
  scores,
)

# Blocks of keys in a tile: larger tiles make fewer grid steps, whose overhead does not depend on
# the tile's size.
_TILE_BLOCKS = 2
# If no score of a head can exceed this, the kernel takes exponentials without subtracting the
# maximum, which halves its time: a sum of 1e6 times e**60 is 1e32, within float32. CogVideoX
# normalizes queries and keys, so that larger scores are rare.
_SAFE_SCORE = 60.0


def key_tile(n: int, block: int) -> int:
  """How many of a row's n keys one grid step loads, next to a block of `block` queries."""
  return min(_TILE_BLOCKS * block, n)


def forward(
  q: Float[Array, "heads head_dim n"],
  k: Float[Array, "heads head_dim n"],
  v: Float[Array, "heads head_dim n"],
  ids: Int[Array, "n"],
  sizes: BlockSizes,
  width: int,
  *,
  interpret: bool | pltpu.InterpretParams,
) -> tuple[Float[Array, "heads head_dim n"], Float32[Array, "heads n"]]:
  """Returns the attention outputs and the logsumexp of each query's scores.

  Args:
    ids: segment ids, never falling along the row, below `block_grid.NO_SEGMENT`.
    width: the grid's inner size: the most tiles of keys that a block of queries needs.
    interpret: run as plain JAX operations, on any device.
  """
  heads, head_dim, n = q.shape
  block, keys = sizes.block, key_tile(n, sizes.block)
  last = math.ceil(n / keys) - 1

  def query_index(head: Any, query: Any, *_: Any) -> Any:
    return head, 0, query

  def tile_index(head: Any, query: Any, step: Any, start: Any, stop: Any, *_: Any) -> Any:
    return head, 0, block_to_load(query, step, start, stop, last)

  query_block = pl.BlockSpec((None, head_dim, block), query_index)
  tile = pl.BlockSpec((None, head_dim, keys), tile_index)
  row = pltpu.VMEM((SUBLANES, block), jnp.float32)
  call = pl.pallas_call(
    partial(_kernel, key_block=sizes.key_block),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      grid=(heads, n // block, width),
      in_specs=[
        *(query_block, tile, tile),
        pl.BlockSpec((SUBLANES, block), lambda *at: query_index(*at)[1:]),
        pl.BlockSpec((SUBLANES, keys), lambda *at: tile_index(*at)[1:]),
      ],
      out_specs=[query_block, pl.BlockSpec((None, 1, block), query_index)],
      scratch_shapes=[row, row, pltpu.VMEM((head_dim, block), jnp.float32)],
    ),
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((heads, 1, n), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary")
    ),
    name="attention_forward",
    interpret=interpret,
  )
  safe = _longest(q) * _longest(k) <= _SAFE_SCORE * head_dim**0.5
  scalars = (*shared_ranges(ids, block, keys), *block_edges(ids, sizes.key_block, keys), safe)
  ids = over_sublanes(ids)
  out, logsumexp = call(*(x.astype(jnp.int32) for x in scalars), q, k, v, ids, ids)
  return out, logsumexp[:, 0]


def _longest(x: Float[Array, "heads head_dim n"]) -> Float32[Array, "heads"]:
  """The largest norm among a head's tokens. NaN is ignored, so that it spoils its segment only."""
  return jnp.sqrt(jnp.nanmax(jnp.square(x.astype(jnp.float32)).sum(1), axis=1))


class _Refs(NamedTuple):
  """What the kernel is given, in the order in which Pallas passes it."""

  start: Any  # [query blocks]: the Ranges of tiles.
  stop: Any
  first: Any  # [key blocks]: the Edges of key blocks.
  last: Any
  safe: Any  # [heads]: 1 if no score can exceed _SAFE_SCORE.
  q: Any  # [head_dim, block]
  k: Any  # [head_dim, keys], as v
  v: Any
  q_ids: Any  # [sublanes, block]
  k_ids: Any  # [sublanes, keys]
  out: Any  # [head_dim, block]
  logsumexp: Any  # [1, block]
  m: Any  # [sublanes, block]: the largest score so far; 0 if the head is safe.
  l: Any  # [sublanes, block]: the sum of exp(score - m).
  acc: Any  # [head_dim, block]: the sum of the values times exp(score - m).


def _kernel(*arguments: Any, key_block: int) -> None:
  """One grid step: a head's block of queries with one tile of keys; tiles are the inner loop."""
  refs = _Refs(*arguments)
  head, query, step = (pl.program_id(axis) for axis in range(3))
  block, keys = refs.q.shape[1], refs.k.shape[1]
  safe, tile = refs.safe[head] != 0, refs.start[query] + step

  @pl.when(step == 0)
  def _() -> None:
    refs.m[...] = jnp.full_like(refs.m, jnp.where(safe, 0.0, MASKED))
    refs.l[...] = jnp.zeros_like(refs.l)
    refs.acc[...] = jnp.zeros_like(refs.acc)

  @pl.when(tile < refs.stop[query])
  def _() -> None:
    edges, count = Edges(refs.first, refs.last), keys // key_block
    queries = edges.of_group(query, block // key_block)
    for is_safe, add in ((True, _add_safe), (False, _add)):
      compute = partial(add, refs, key_block)
      run = partial(for_key_blocks, queries, edges, tile * count, count, compute)
      pl.when(safe == is_safe)(run)

  @pl.when(step == pl.num_programs(2) - 1)
  def _() -> None:
    refs.out[...] = (refs.acc[...] / refs.l[:1]).astype(refs.out.dtype)
    refs.logsumexp[...] = refs.m[:1] + jnp.log(refs.l[:1])


def _add_safe(refs: _Refs, key_block: int, index: int, masked: bool) -> None:
  """Adds a key block to l and acc; m stays 0."""
  s, v = _scores_and_values(refs, key_block, index, masked)
  p = jnp.exp(s)
  refs.l[...] += p.sum(0, keepdims=True)
  refs.acc[...] += product(v, p.astype(v.dtype), NN)


def _add(refs: _Refs, key_block: int, index: int, masked: bool) -> None:
  """Adds a key block to m, l and acc (online softmax)."""
  s, v = _scores_and_values(refs, key_block, index, masked)
  m_before = refs.m[...]
  m = jnp.maximum(m_before, s.max(0, keepdims=True))
  p, shrink = jnp.exp(s - m[:1]), jnp.exp(m_before - m)
  refs.m[...] = m
  refs.l[...] = shrink * refs.l[...] + p.sum(0, keepdims=True)
  refs.acc[...] = shrink[:1] * refs.acc[...] + product(v, p.astype(v.dtype), NN)


def _scores_and_values(refs: _Refs, key_block: int, index: int, masked: bool) -> tuple[Any, Any]:
  """The scores [key_block, block] and the values of the tile's key block number `index`."""
  chosen = pl.ds(index * key_block, key_block)
  q = scaled(refs.q[...])
  s = scores(q, refs.k[:, chosen], refs.q_ids[...], refs.k_ids[:, chosen], masked)
  return s, refs.v[:, chosen]
