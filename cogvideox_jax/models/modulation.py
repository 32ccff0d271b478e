"""What tokens are given of small tables: the modulation of their clip, by timestep and expert."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows of the clips of a row that has one: its text's and its vision's.
ONE_CLIP = 2
_EXACT = jax.lax.Precision.HIGHEST


@jax.custom_vjp
def per_token(table: Float[Array, "b rows d"], index: Int[Array, "b n"]) -> Float[Array, "b n d"]:
  """Each token's row of a table, of the same values bit by bit; below 0, for padding, any.

  By comparing where rows are few, which adds nothing to what the values are for. Else, and for the
  gradient, as a product with ones and zeros, for matrix units: the gradient of a lookup would be
  added up one token after the other.
  """
  if table.shape[1] > ONE_CLIP:
    return jnp.einsum("bnr,brd->bnd", _chosen(table, index), table, precision=_EXACT)
  found = table[:, :1]
  for row in range(1, table.shape[1]):
    found = jnp.where(index[..., None] == row, table[:, row : row + 1], found)
  return jnp.broadcast_to(found, (*index.shape, table.shape[2]))


def _forward(table: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
  return per_token(table, index), (table, index)


def _backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, None]:
  table, index = saved
  return jnp.einsum("bnr,bnd->brd", _chosen(table, index), g, precision=_EXACT), None


per_token.defvjp(_forward, _backward)


def _chosen(table: Array, index: Array) -> Float[Array, "b n rows"]:
  return jax.nn.one_hot(index, table.shape[1], dtype=table.dtype)
