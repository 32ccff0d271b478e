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


def spread(ids: Int[Array, "n"]) -> tuple[Int[Array, "sublanes n"], Int[Array, "n lanes"]]:
  """The segments of queries and of keys, as the kernels take them."""
  n = len(ids)
  return jnp.broadcast_to(ids, (SUBLANES, n)), jnp.broadcast_to(ids[:, None], (n, LANES))


def product(a: Array, b: Array, summed: tuple[tuple[int], tuple[int]]) -> Float32[Array, "m n"]:
  return jax.lax.dot_general(a, b, (summed, ((), ())), preferred_element_type=jnp.float32)


def scaled(q: Float[Array, "head_dim q"]) -> Float[Array, "head_dim q"]:
  """Here and not before: around an exchange of heads that would take a pass of its own."""
  return q * q.shape[0] ** -0.5


def scores(
  q: Float[Array, "head_dim q"],  # Scaled.
  k: Float[Array, "head_dim k"],
  q_ids: Int[Array, "1 q"],
  k_ids: Int[Array, "k lanes"],  # The same in every lane.
) -> Float32[Array, "k q"]:
  same = jnp.tile(k_ids, (1, q.shape[1] // LANES)) == q_ids
  return jnp.where(same, product(k, q, FIRST), HIDDEN)
