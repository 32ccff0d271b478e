"""The gradients of attention inside each segment of a packed row, by one kernel for TPUs.

JAX's own backward kernels compute every block of scores twice, or leave a whole gradient of the
queries for each block of keys, to be added up afterwards. Here a block of scores is computed once,
and the gradient of a block of queries waits in vector memory, in float32, until the last block of
keys that it meets: 5 matrix products instead of 7, whatever the row's length.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int

from cogvideox_jax.models.kernels.block_grid import (
  Edges,
  Meeting,
  edges,
  fetched,
  for_parts,
  meeting,
)
from cogvideox_jax.models.kernels.segment_attention_scores import (
  FIRST,
  LAST,
  PLAIN,
  SUBLANES,
  product,
  scaled,
  scores,
  spread,
)

# Bytes of vector memory for the gradient of queries, 131,072 tokens of a head of 64, and for the
# whole kernel, a little less than a core of a v5p has.
WAITING = 32 * 2**20
VECTOR_MEMORY = 60 * 2**20


def backward(
  q: Float[Array, "heads head_dim n"],
  k: Float[Array, "heads head_dim n"],
  v: Float[Array, "heads head_dim n"],
  ids: Int[Array, "n"],
  out: Float[Array, "heads head_dim n"],
  log_sum: Float32[Array, "heads n"],
  g: Float[Array, "heads head_dim n"],
  block: int,
  compute: int,
  width: int,
  *,
  interpret: bool | pltpu.InterpretParams,
  waiting: int = WAITING,
) -> tuple[
  Float[Array, "heads head_dim n"],
  Float[Array, "heads head_dim n"],
  Float[Array, "heads head_dim n"],
]:
  """The gradients of q, k and v, given that of `out`, which is `g`.

  Args:
    ids: never falling along the row; below `block_grid.NO_SEGMENT`.
    log_sum: logarithm of the sum of a query's exponentiated scores.
    block: tokens of a block of queries, and of keys; divides n, a multiple of the lanes.
    compute: tokens of keys that are taken at a time; divides `block`.
    width: the most blocks that one block may meet.
    interpret: run as plain JAX operations.
    waiting: bytes of vector memory for what waits.
  """
  blocks = q.shape[2] // block
  most = max(1, waiting // (4 * q.shape[1] * block))
  # d scores = weights * (d weights - the sum of these by their weights), and that sum is g * out.
  mean = (out.astype(jnp.float32) * g.astype(jnp.float32)).sum(1)
  run = partial(
    _call,
    meeting(ids, block, block),
    (q, k, v, g, log_sum[:, None], mean[:, None]),
    ids,
    width=min(width, most),
    compute=compute,
    interpret=interpret,
  )
  if width <= most:
    return run(0, length=blocks, dtype=q.dtype)

  # Some clip is too long for all of its queries' gradient to wait: it is taken in parts.
  def add(sums: tuple[Array, Array], first: Array) -> tuple[tuple[Array, Array], Array]:
    dq, *of_part = run(first, length=most, dtype=jnp.float32)
    return jax.tree.map(jnp.add, sums, tuple(of_part)), dq.astype(q.dtype)

  zeros = jnp.zeros(q.shape, jnp.float32)
  (dk, dv), dq = jax.lax.scan(add, (zeros, zeros), jnp.arange(0, blocks, most))
  dq = rearrange(dq, "parts heads e n -> heads e (parts n)")[..., : q.shape[2]]
  return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def _call(
  met: Meeting,
  arrays: tuple[Array, ...],
  ids: Int[Array, "n"],
  first: Int[Array, ""] | int,
  *,
  length: int,
  width: int,
  compute: int,
  dtype: Any,
  interpret: bool | pltpu.InterpretParams,
) -> Any:
  """The gradients that the blocks of queries from `first` on give, `length` of them."""
  q = arrays[0]
  (heads, head_dim, n), blocks = q.shape, len(met.start)
  block = n // blocks
  start, stop = (jnp.clip(x, first, first + length) for x in met)

  def query(head: Any, key: Any, step: Any, start: Any, stop: Any, *_: Any) -> Any:
    return head, 0, fetched(key, step, start, stop, blocks - 1)

  def key(head: Any, key: Any, *_: Any) -> Any:
    return head, 0, key

  of_queries = pl.BlockSpec((None, head_dim, block), query)
  of_keys = pl.BlockSpec((None, head_dim, block), key)
  number_a_query = pl.BlockSpec((None, 1, block), query)
  ids_of_queries = pl.BlockSpec((SUBLANES, block), lambda *at: query(*at)[1:])
  ids_of_keys = pl.BlockSpec((SUBLANES, block), lambda *at: key(*at)[1:])
  of_block = pltpu.VMEM((head_dim, block), jnp.float32)
  gradient = partial(jax.ShapeDtypeStruct, dtype=dtype)
  call = pl.pallas_call(
    partial(_kernel, compute=compute),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=7,
      grid=(heads, blocks, width),
      in_specs=[
        *(of_queries, of_keys, of_keys, of_queries),
        *(number_a_query, number_a_query, ids_of_queries, ids_of_keys),
      ],
      out_specs=[pl.BlockSpec(memory_space=pl.ANY), of_keys, of_keys],
      scratch_shapes=[
        pltpu.VMEM((width, head_dim, block), jnp.float32),
        pltpu.VMEM((head_dim, block), dtype),
        pltpu.SemaphoreType.DMA,
        of_block,
        of_block,
      ],
    ),
    out_shape=[gradient((heads, head_dim, length * block)), gradient(q.shape), gradient(q.shape)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VECTOR_MEMORY
    ),
    name="attention_backward",
    interpret=interpret,
  )
  scalars = start, stop, *met, *edges(ids, compute, block), jnp.reshape(first, 1)
  ids = spread(ids)
  return tuple(call(*(x.astype(jnp.int32) for x in scalars), *arrays, ids, ids))


def _kernel(
  start_ref: Any,  # Of the blocks of queries that each block of keys meets, of this part.
  stop_ref: Any,
  first_key_ref: Any,  # Of the blocks of keys that each block of queries meets.
  end_key_ref: Any,
  first_ref: Any,  # The segments at the edges of each part of keys.
  last_ref: Any,
  part_ref: Any,  # Where the part begins.
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  g_ref: Any,
  log_sum_ref: Any,
  mean_ref: Any,
  q_ids_ref: Any,
  k_ids_ref: Any,
  dq_hbm: Any,  # In the device's main memory.
  dk_ref: Any,
  dv_ref: Any,
  waiting_ref: Any,  # Sums for the blocks of queries, each at its number modulo the width.
  finished_ref: Any,  # One on its way to dq_hbm.
  semaphore: Any,
  dk_sum_ref: Any,
  dv_sum_ref: Any,
  *,
  compute: int,
) -> None:
  """One block of queries and one of keys, of one head; the queries' follow one another."""
  head, key, step = (pl.program_id(axis) for axis in range(3))
  last_key, width = pl.num_programs(1) - 1, pl.num_programs(2)
  block = q_ref.shape[1]
  query = start_ref[key] + step
  sum_ref = waiting_ref.at[jax.lax.rem(query, width)]
  segments, parts = Edges(first_ref, last_ref), block // compute

  def send(number: Any) -> Any:
    begin = pl.multiple_of((number - part_ref[0]) * block, block)
    place = dq_hbm.at[head, :, pl.ds(begin, block)]
    return pltpu.make_async_copy(finished_ref, place, semaphore)

  @pl.when(step == 0)
  def _() -> None:
    dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
    dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

  def take(part: int, masked: bool) -> None:
    some, q, g = pl.ds(part * compute, compute), scaled(q_ref[...]), g_ref[...]
    k, v = k_ref[:, some], v_ref[:, some]
    found = scores(q, k, q_ids_ref[...], k_ids_ref[:, some], masked)
    weights = jnp.exp(found - log_sum_ref[...])
    d_scores = ((product(v, g, FIRST) - mean_ref[...]) * weights).astype(q.dtype)
    dv_sum_ref[:, some] += product(g, weights.astype(q.dtype), LAST)
    dk_sum_ref[:, some] += product(q, d_scores, LAST)
    sum_ref[...] += product(k, d_scores, PLAIN)

  @pl.when(query < stop_ref[key])
  def _() -> None:
    @pl.when(key == first_key_ref[query])
    def _() -> None:
      sum_ref[...] = jnp.zeros_like(sum_ref)

    for_parts(segments.of_block(query, parts), segments, key * parts, parts, take)

    @pl.when(key == end_key_ref[query] - 1)
    def _() -> None:
      # Blocks of queries are finished in their order: the one before has long been sent.
      @pl.when(query > part_ref[0])
      def _() -> None:
        send(query - 1).wait()

      finished_ref[...] = scaled(sum_ref[...]).astype(finished_ref.dtype)
      send(query).start()

  @pl.when(step == width - 1)
  def _() -> None:
    dk_ref[...] = dk_sum_ref[...].astype(dk_ref.dtype)
    dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)

    @pl.when(key == last_key)
    def _() -> None:
      send(part_ref[0]).wait()  # For as much as any other.
