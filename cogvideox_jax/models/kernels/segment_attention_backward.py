"""Attention inside each segment of a packed row: the gradient kernel for TPUs.

JAX's backward kernels compute every block of scores twice, or write a whole dq for each block of
keys, to be summed afterwards. This one computes a block of scores once: dq of a block of queries
stays in vector memory, in float32, until the last block of keys that it needs. That is 5 matrix
products instead of 7, whatever the row's length.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int

from cogvideox_jax.models.kernels.block_grid import (
  BlockSizes,
  Edges,
  Ranges,
  block_edges,
  block_to_load,
  for_key_blocks,
  shared_ranges,
)
from cogvideox_jax.models.kernels.segment_attention_scores import (
  NN,
  NT,
  SUBLANES,
  TN,
  over_sublanes,
  product,
  scaled,
  scores,
)

# Bytes of vector memory: for dq, which is 131,072 tokens of a head of 64, and for the whole kernel,
# a little less than a core of a v5p has.
DQ_BYTES = 32 * 2**20
VMEM_BYTES = 60 * 2**20


class Residuals(NamedTuple):
  """What the backward pass of a row needs of the forward pass: its arguments and its results."""

  q: Float[Array, "heads head_dim n"]
  k: Float[Array, "heads head_dim n"]
  v: Float[Array, "heads head_dim n"]
  ids: Int[Array, "n"]
  out: Float[Array, "heads head_dim n"]
  logsumexp: Float32[Array, "heads n"]


def backward(
  residuals: Residuals,
  do: Float[Array, "heads head_dim n"],
  sizes: BlockSizes,
  width: int,
  *,
  interpret: bool | pltpu.InterpretParams,
  dq_bytes: int = DQ_BYTES,
) -> tuple[
  Float[Array, "heads head_dim n"],
  Float[Array, "heads head_dim n"],
  Float[Array, "heads head_dim n"],
]:
  """Returns dq, dk and dv; `do` is the gradient of `out`.

  Args:
    width: the grid's inner size: the most blocks of queries that a block of keys needs.
    interpret: run as plain JAX operations, on any device.
    dq_bytes: vector memory for dq; if a clip needs more, its queries are taken in several spans.
  """
  q, k, v, ids, out, logsumexp = residuals
  blocks = q.shape[2] // sizes.block
  span = max(1, dq_bytes // (4 * q.shape[1] * sizes.block))
  # ds = p * (dp - delta), where delta, the sum of p * dp over the keys, equals that of do * out.
  delta = (out.astype(jnp.float32) * do.astype(jnp.float32)).sum(1)
  run = partial(
    _call,
    shared_ranges(ids, sizes.block, sizes.block),
    (q, k, v, do, logsumexp[:, None], delta[:, None]),
    ids,
    width=min(width, span),
    key_block=sizes.key_block,
    interpret=interpret,
  )
  if width <= span:
    return run(0, length=blocks, dtype=q.dtype)

  def add(sums: tuple[Array, Array], first: Array) -> tuple[tuple[Array, Array], Array]:
    dq, *added = run(first, length=span, dtype=jnp.float32)
    return jax.tree.map(jnp.add, sums, tuple(added)), dq.astype(q.dtype)

  zeros = jnp.zeros(q.shape, jnp.float32)
  (dk, dv), dq = jax.lax.scan(add, (zeros, zeros), jnp.arange(0, blocks, span))
  dq = rearrange(dq, "spans heads e n -> heads e (spans n)")[..., : q.shape[2]]
  return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def _call(
  ranges: Ranges,
  arrays: tuple[Array, ...],
  ids: Int[Array, "n"],
  first: Int[Array, ""] | int,
  *,
  length: int,
  width: int,
  key_block: int,
  dtype: Any,
  interpret: bool | pltpu.InterpretParams,
) -> Any:
  """dq of the span of `length` blocks of queries from `first` on, and what it adds to dk and dv.

  Args:
    arrays: q, k, v, do [heads head_dim n], logsumexp and delta [heads 1 n].
    dtype: of the three results.
  """
  q = arrays[0]
  (heads, head_dim, n), blocks = q.shape, len(ranges.start)
  block = n // blocks
  start, stop = (jnp.clip(x, first, first + length) for x in ranges)
  gradient = partial(jax.ShapeDtypeStruct, dtype=dtype)
  call = pl.pallas_call(
    partial(_kernel, key_block=key_block),
    grid_spec=_grid_spec(heads, head_dim, block, blocks, width, dtype),
    out_shape=[gradient((heads, head_dim, length * block)), gradient(q.shape), gradient(q.shape)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    ),
    name="attention_backward",
    interpret=interpret,
  )
  scalars = start, stop, *ranges, *block_edges(ids, key_block, block), jnp.reshape(first, 1)
  ids = over_sublanes(ids)
  return tuple(call(*(x.astype(jnp.int32) for x in scalars), *arrays, ids, ids))


def _grid_spec(
  heads: int, head_dim: int, block: int, blocks: int, width: int, dtype: Any
) -> pltpu.PrefetchScalarGridSpec:
  """Says which blocks of the arrays each grid step sees, and what it keeps; `_Refs` names them."""

  def query_index(head: Any, key: Any, step: Any, start: Any, stop: Any, *_: Any) -> Any:
    return head, 0, block_to_load(key, step, start, stop, blocks - 1)

  def key_index(head: Any, key: Any, *_: Any) -> Any:
    return head, 0, key

  query_spec = pl.BlockSpec((None, head_dim, block), query_index)
  key_spec = pl.BlockSpec((None, head_dim, block), key_index)
  row_spec = pl.BlockSpec((None, 1, block), query_index)
  q_ids_spec = pl.BlockSpec((SUBLANES, block), lambda *at: query_index(*at)[1:])
  k_ids_spec = pl.BlockSpec((SUBLANES, block), lambda *at: key_index(*at)[1:])
  acc = pltpu.VMEM((head_dim, block), jnp.float32)
  return pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=7,
    grid=(heads, blocks, width),
    in_specs=[
      *(query_spec, key_spec, key_spec, query_spec),
      *(row_spec, row_spec, q_ids_spec, k_ids_spec),
    ],
    out_specs=[pl.BlockSpec(memory_space=pl.ANY), key_spec, key_spec],
    scratch_shapes=[
      pltpu.VMEM((width, head_dim, block), jnp.float32),
      pltpu.VMEM((head_dim, block), dtype),
      pltpu.SemaphoreType.DMA,
      acc,
      acc,
    ],
  )


class _Refs(NamedTuple):
  """What the kernel is given, in the order in which Pallas passes it."""

  start: Any  # [key blocks]: the Ranges of query blocks, cut to the span.
  stop: Any
  first_key: Any  # [query blocks]: the Ranges of blocks of keys that each block of queries needs.
  stop_key: Any
  first: Any  # [key blocks]: the Edges of key blocks.
  last: Any
  span: Any  # [1]: the span's first block of queries.
  q: Any  # [head_dim, block], as k, v and do
  k: Any
  v: Any
  do: Any
  logsumexp: Any  # [1, block], as delta
  delta: Any
  q_ids: Any  # [sublanes, block], as k_ids
  k_ids: Any
  dq_hbm: Any  # [heads, head_dim, tokens of the span]: in the device's main memory.
  dk: Any  # [head_dim, block], as dv
  dv: Any
  dq_acc: Any  # [width, head_dim, block]: block number b of the queries is in slot b modulo width.
  dq_done: Any  # [head_dim, block]: a finished block on its way to dq_hbm.
  semaphore: Any
  dk_acc: Any  # [head_dim, block], as dv_acc
  dv_acc: Any


def _kernel(*arguments: Any, key_block: int) -> None:
  """One grid step: a head's blocks of keys and queries; queries are the inner loop."""
  refs = _Refs(*arguments)
  head, key, step = (pl.program_id(axis) for axis in range(3))
  last_key, width = pl.num_programs(1) - 1, pl.num_programs(2)
  block = refs.q.shape[1]
  query = refs.start[key] + step
  dq_acc = refs.dq_acc.at[jax.lax.rem(query, width)]
  edges, count = Edges(refs.first, refs.last), block // key_block

  def copy(query: Any) -> Any:
    """The copy of a finished dq to main memory."""
    begin = pl.multiple_of((query - refs.span[0]) * block, block)
    target = refs.dq_hbm.at[head, :, pl.ds(begin, block)]
    return pltpu.make_async_copy(refs.dq_done, target, refs.semaphore)

  @pl.when(step == 0)
  def _() -> None:
    refs.dk_acc[...] = jnp.zeros_like(refs.dk_acc)
    refs.dv_acc[...] = jnp.zeros_like(refs.dv_acc)

  @pl.when(query < refs.stop[key])
  def _() -> None:
    @pl.when(key == refs.first_key[query])
    def _() -> None:
      dq_acc[...] = jnp.zeros_like(dq_acc)

    compute = partial(_add, refs, dq_acc, key_block)
    for_key_blocks(edges.of_group(query, count), edges, key * count, count, compute)

    @pl.when(key == refs.stop_key[query] - 1)
    def _() -> None:
      # Blocks of queries finish in order, so the copy of the one before was started long ago.
      @pl.when(query > refs.span[0])
      def _() -> None:
        copy(query - 1).wait()

      refs.dq_done[...] = scaled(dq_acc[...]).astype(refs.dq_done.dtype)
      copy(query).start()

  @pl.when(step == width - 1)
  def _() -> None:
    refs.dk[...] = refs.dk_acc[...].astype(refs.dk.dtype)
    refs.dv[...] = refs.dv_acc[...].astype(refs.dv.dtype)

    @pl.when(key == last_key)
    def _() -> None:
      copy(refs.span[0]).wait()  # All copies are of one size: this waits for the last one.


def _add(refs: _Refs, dq_acc: Any, key_block: int, index: int, masked: bool) -> None:
  """Adds key block number `index` of the block of keys to dq, dk and dv."""
  chosen, q, do = pl.ds(index * key_block, key_block), scaled(refs.q[...]), refs.do[...]
  k, v = refs.k[:, chosen], refs.v[:, chosen]
  s = scores(q, k, refs.q_ids[...], refs.k_ids[:, chosen], masked)
  p = jnp.exp(s - refs.logsumexp[...])
  ds = ((product(v, do, TN) - refs.delta[...]) * p).astype(q.dtype)
  refs.dv_acc[:, chosen] += product(do, p.astype(q.dtype), NT)
  refs.dk_acc[:, chosen] += product(q, ds, NT)
  dq_acc[...] += product(k, ds, NN)
