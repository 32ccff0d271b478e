"""Attention inside each segment of a packed row, by a kernel for TPUs that skips other blocks.

Beside JAX's splash kernel, which takes twice as long for heads of 64 numbers on the newer chips:
tokens are in the lanes here, so that the products fill the matrix unit, and what belongs to a query
is a row; and where no score of a head can be large, none is searched for the largest.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int

from cogvideox_jax.models.kernels.block_grid import Edges, edges, fetched, for_parts, meeting
from cogvideox_jax.models.kernels.segment_attention_scores import (
  HIDDEN,
  PLAIN,
  SUBLANES,
  product,
  scaled,
  scores,
  spread,
)

# Keys come so many blocks at a time: what a step takes beside its products is the same for all.
_KEYS = 2
# Where no score can be beyond it, either way, exponentials stay in float32's range as they are: a
# sum of 1e6 times e**60 is about 1e32. Otherwise all wait for the largest score before, and take
# nearly twice as long. Heads that are normalized, as all CogVideoX's are, seldom have larger ones.
_SMALL = 60.0


def block_of_keys(n: int, block: int) -> int:
  """How many of a row's n tokens a block of keys has, beside one of `block` queries."""
  return min(_KEYS * block, n)


def forward(
  q: Float[Array, "heads head_dim n"],
  k: Float[Array, "heads head_dim n"],
  v: Float[Array, "heads head_dim n"],
  ids: Int[Array, "n"],
  block: int,
  compute: int,
  width: int,
  *,
  interpret: bool | pltpu.InterpretParams,
) -> tuple[Float[Array, "heads head_dim n"], Float32[Array, "heads n"]]:
  """The values of each token's segment by its weights, and the logarithms of the weights' sums.

  Args:
    ids: never falling along the row; below `block_grid.NO_SEGMENT`.
    block: tokens of a block of queries; divides n, a multiple of the lanes.
    compute: tokens of keys that are taken at a time; divides `block`.
    width: the most blocks of keys that one of queries may meet.
    interpret: run as plain JAX operations.
  """
  heads, head_dim, n = q.shape
  keys = block_of_keys(n, block)
  last = math.ceil(n / keys) - 1

  def query(head: Any, query: Any, *_: Any) -> Any:
    return head, 0, query

  def key(head: Any, query: Any, step: Any, start: Any, stop: Any, *_: Any) -> Any:
    return head, 0, fetched(query, step, start, stop, last)

  of_queries = pl.BlockSpec((None, head_dim, block), query)
  of_keys = pl.BlockSpec((None, head_dim, keys), key)
  row = pltpu.VMEM((SUBLANES, block), jnp.float32)
  call = pl.pallas_call(
    partial(_kernel, compute=compute),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      grid=(heads, n // block, width),
      in_specs=[
        *(of_queries, of_keys, of_keys),
        pl.BlockSpec((SUBLANES, block), lambda *at: query(*at)[1:]),
        pl.BlockSpec((SUBLANES, keys), lambda *at: key(*at)[1:]),
      ],
      out_specs=[of_queries, pl.BlockSpec((None, 1, block), query)],
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
  small = _longest(q) * _longest(k) <= _SMALL * head_dim**0.5
  scalars = (*meeting(ids, block, keys), *edges(ids, compute, keys), small)
  ids = spread(ids)
  out, log_sum = call(*(x.astype(jnp.int32) for x in scalars), q, k, v, ids, ids)
  return out, log_sum[:, 0]


def _longest(x: Float[Array, "heads head_dim n"]) -> Float32[Array, "heads"]:
  """The most that a token's numbers of a head measure. One of NaN spoils its own segment alone."""
  return jnp.sqrt(jnp.nanmax(jnp.square(x.astype(jnp.float32)).sum(1), axis=1))


def _kernel(
  start_ref: Any,  # Of the blocks of keys that each block of queries meets.
  stop_ref: Any,
  first_ref: Any,  # The segments at the edges of each part of keys.
  last_ref: Any,
  small_ref: Any,  # Whether all scores of a head are small.
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  q_ids_ref: Any,
  k_ids_ref: Any,
  out_ref: Any,
  log_sum_ref: Any,
  most_ref: Any,  # Of the scores so far, or 0 if they are small,
  sum_ref: Any,  # the sum of the exponentials of what the scores are above it,
  out_sum_ref: Any,  # and the values by these.
  *,
  compute: int,
) -> None:
  """One block of queries and one of keys, of one head; the keys' follow one another."""
  head, query, step = (pl.program_id(axis) for axis in range(3))
  block, keys = q_ref.shape[1], k_ref.shape[1]
  small, key = small_ref[head] != 0, start_ref[query] + step

  @pl.when(step == 0)
  def _() -> None:
    most_ref[...] = jnp.full_like(most_ref, jnp.where(small, 0.0, HIDDEN))
    sum_ref[...] = jnp.zeros_like(sum_ref)
    out_sum_ref[...] = jnp.zeros_like(out_sum_ref)

  def found(part: int, masked: bool) -> tuple[Any, Any]:
    some = pl.ds(part * compute, compute)
    q = scaled(q_ref[...])
    return scores(q, k_ref[:, some], q_ids_ref[...], k_ids_ref[:, some], masked), v_ref[:, some]

  def take_small(part: int, masked: bool) -> None:
    some, v = found(part, masked)
    weights = jnp.exp(some)
    sum_ref[...] += weights.sum(0, keepdims=True)
    out_sum_ref[...] += product(v, weights.astype(v.dtype), PLAIN)

  def take_any(part: int, masked: bool) -> None:
    some, v = found(part, masked)
    before = most_ref[...]
    most = jnp.maximum(before, some.max(0, keepdims=True))
    weights, kept = jnp.exp(some - most[:1]), jnp.exp(before - most)
    most_ref[...] = most
    sum_ref[...] = kept * sum_ref[...] + weights.sum(0, keepdims=True)
    out_sum_ref[...] = kept[:1] * out_sum_ref[...] + product(v, weights.astype(v.dtype), PLAIN)

  @pl.when(key < stop_ref[query])
  def _() -> None:
    segments, parts = Edges(first_ref, last_ref), keys // compute
    queries = segments.of_block(query, block // compute)
    for of_small, take in ((True, take_small), (False, take_any)):
      run = partial(for_parts, queries, segments, key * parts, parts, take)
      pl.when(small == of_small)(run)

  @pl.when(step == pl.num_programs(2) - 1)
  def _() -> None:
    out_ref[...] = (out_sum_ref[...] / sum_ref[:1]).astype(out_ref.dtype)
    log_sum_ref[...] = most_ref[:1] + jnp.log(sum_ref[:1])
