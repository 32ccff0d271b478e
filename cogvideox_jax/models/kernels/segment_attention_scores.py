"""What both attention kernels for TPUs share: the scores of a block of queries and a block of keys.

Arrays are [head_dim, tokens], with tokens along the lanes, so that each product fills the matrix
unit although heads are only 64 wide. Scores are [keys, queries], so that a number per query is a
row.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from cogvideox_jax.models.kernels.block_grid import LANES

SUBLANES = 8  # Rows of a vector register.
MASKED = -0.7 * float(np.finfo(np.float32).max)  # The score of a key of another segment.
# The axes that a product sums over, by which operands are transposed as in BLAS: N no, T yes.
NN, TN, NT = ((1,), (0,)), ((0,), (0,)), ((1,), (1,))


def over_sublanes(ids: Int[Array, "n"]) -> Int[Array, "sublanes n"]:
  """Repeats the ids in every sublane here, because to broadcast them in a kernel takes time."""
  return jnp.broadcast_to(ids, (SUBLANES, len(ids)))


def product(a: Array, b: Array, axes: tuple[tuple[int], tuple[int]]) -> Float32[Array, "m n"]:
  """The matrix product in float32; axes: NN, TN or NT."""
  return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)


def scaled(q: Float[Array, "head_dim q"]) -> Float[Array, "head_dim q"]:
  """Divides by the square root of head_dim.

  The kernels do it, because outside them, next to an all-to-all over heads, it would be a pass over
  q of its own.
  """
  return q * q.shape[0] ** -0.5


def scores(
  q: Float[Array, "head_dim q"],
  k: Float[Array, "head_dim k"],
  q_ids: Int[Array, "sublanes q"],
  k_ids: Int[Array, "sublanes k"],
  masked: bool,
) -> Float32[Array, "k q"]:
  """The products of keys and queries, MASKED where their segments differ.

  Args:
    q: scaled.
    masked: False if all tokens are known to lie in one segment; then the ids are not read.
  """
  s = product(k, q, TN)
  if not masked:
    return s
  k_ids = jnp.tile(k_ids, (LANES // SUBLANES, 1)).T
  same_segment = jnp.tile(k_ids, (1, q.shape[1] // LANES)) == q_ids[:1]
  return jnp.where(same_segment, s, MASKED)
