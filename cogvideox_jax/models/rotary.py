"""Rotary positions: queries and keys are rotated by angles that grow with a token's position."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cogvideox_jax.types import VISION

THETA = 10_000.0

RotaryTable = tuple[Float[Array, "b n half"], Float[Array, "b n half"]]  # Cosines and sines.


def rotary_table(
  positions: Float[Array, "b n 3"], experts: Int[Array, "b n"], head_dim: int
) -> RotaryTable:
  """Cosines and sines of each token's angles; text tokens are not rotated.

  A quarter of the head's dimensions turns with time, three eighths each with height and width.
  head_dim is a multiple of 16.
  """
  angles = []
  for axis, width in enumerate((head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)):
    frequency = THETA ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles.append(positions[..., axis, None] * frequency)
  angle = jnp.where((experts == VISION)[..., None], jnp.concatenate(angles, axis=-1), 0.0)
  return jnp.cos(angle), jnp.sin(angle)


def rotate(
  x: Float[Array, "b n heads head_dim"], table: RotaryTable
) -> Float[Array, "b n heads head_dim"]:
  """Rotates each pair of neighbouring dimensions by its angle, in fp32."""
  cos, sin = (jnp.repeat(half, 2, axis=-1)[:, :, None] for half in table)
  # A product with 1, -1 and 0 swaps the neighbours. It is exact, and matrix units do it in passing,
  # while to split the pairs and to join them again takes a pass over all tokens.
  quarter_turn = jnp.kron(jnp.eye(x.shape[-1] // 2), jnp.array([[0, 1], [-1, 0]])).astype(x.dtype)
  exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
  turned = jnp.einsum("bnhe,ef->bnhf", x, quarter_turn, **exact)
  return (jnp.float32(x) * cos + turned * sin).astype(x.dtype)
