"""What both passes of the TPU's attention kernel share: scores of keys by queries.

Everything has tokens in the lanes, so that each product fills the matrix unit though heads are 64
numbers wide; scores have keys along the first axis, so that what belongs to a query is a row.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

LANES = 128  # Every block is a multiple of the registers' lanes.
SUBLANES = 8  # A number of each query stands in all of them: to spread it there takes time.
HIDDEN = -0.7 * float(np.finfo(np.float32).max)  # The score of a key of another segment.
# Which axes a product sums over.
PLAIN, FIRST, LAST = ((1,), (0,)), ((0,), (0,)), ((1,), (1,))


def spread(ids: Int[Array, "n"]) -> Int[Array, "sublanes n"]:
  """The segments of tokens, as the kernels take them."""
  return jnp.broadcast_to(ids, (SUBLANES, len(ids)))


def product(a: Array, b: Array, summed: tuple[tuple[int], tuple[int]]) -> Float32[Array, "m n"]:
  return jax.lax.dot_general(a, b, (summed, ((), ())), preferred_element_type=jnp.float32)


def scaled(q: Float[Array, "head_dim q"]) -> Float[Array, "head_dim q"]:
  """Here and not before: around an exchange of heads that would take a pass of its own."""
  return q * q.shape[0] ** -0.5


def scores(
  q: Float[Array, "head_dim q"],  # Scaled.
  k: Float[Array, "head_dim k"],
  q_ids: Int[Array, "sublanes q"],
  k_ids: Int[Array, "sublanes k"],
  masked: bool,
) -> Float32[Array, "k q"]:
  """Where they are not masked, all tokens are of one segment."""
  found = product(k, q, FIRST)
  if not masked:
    return found
  of_keys = jnp.tile(k_ids, (LANES // SUBLANES, 1)).T
  same = jnp.tile(of_keys, (1, q.shape[1] // LANES)) == q_ids[:1]
  return jnp.where(same, found, HIDDEN)
