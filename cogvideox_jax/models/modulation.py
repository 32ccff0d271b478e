"""Looks up each token's modulation in the table of its clip and expert."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ONE_CLIP = 2  # Rows of the table if a packed row holds one clip: its vision's and its text's.
_EXACT = jax.lax.Precision.HIGHEST


@jax.custom_vjp
def per_token(table: Float[Array, "b rows d"], index: Int[Array, "b n"]) -> Float[Array, "b n d"]:
  """Each token's row of the table, bit by bit; where the index is below 0 (padding), any row.

  A plain lookup is avoided, because its gradient is added up one token after the other. Tables of
  ONE_CLIP or fewer rows are selected from by comparison, which fuses with what uses the result.
  Larger ones, and all gradients, are products with a one-hot matrix, which run on matrix units.
  """
  if table.shape[1] > ONE_CLIP:
    return jnp.einsum("bnr,brd->bnd", _one_hot(table, index), table, precision=_EXACT)
  out = table[:, :1]
  for row in range(1, table.shape[1]):
    out = jnp.where(index[..., None] == row, table[:, row : row + 1], out)
  return jnp.broadcast_to(out, (*index.shape, table.shape[2]))


def _forward(table: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
  return per_token(table, index), (table, index)


def _backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, None]:
  table, index = residuals
  return jnp.einsum("bnr,bnd->brd", _one_hot(table, index), g, precision=_EXACT), None


per_token.defvjp(_forward, _backward)


def _one_hot(table: Array, index: Array) -> Float[Array, "b n rows"]:
  return jax.nn.one_hot(index, table.shape[1], dtype=table.dtype)
