"""How positions enter the transformer: added to the tokens, or as a rotation of queries and keys.

The transformer calls `added` and `rotation` only, so that a rule is chosen nowhere else.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.positions import ROTARY_RULES, rotary_positions
from cogvideox_jax.models.rotary import RotaryTable, rotary_table
from cogvideox_jax.models.sincos import sincos_table, table_row
from cogvideox_jax.types import TokenLayout


def added(
  config: DiTConfig, layout: TokenLayout, learned: Float[Array, "tokens d"] | None
) -> Float[Array, "b n d"] | None:
  """The vectors that are added to the tokens before the blocks; None if the model adds none.

  learned: the table of a model with learned positions. Clips of another grid than the table's get
  the computed vectors, as in diffusers.
  """
  if config.positions != "sincos" and learned is None:
    return None
  coordinates, experts = layout.coordinates, layout.experts
  computed = sincos_table(coordinates, experts, config.width, *config.interpolations)
  if learned is None:
    return computed
  grid, base = grid_of_token(layout), config.base_grid
  row = table_row(coordinates, experts, config.text_length, base)
  fits = (grid == jnp.asarray(base)).all(-1, keepdims=True)
  return jnp.where(fits, jnp.take(learned, row, axis=0), computed)


def rotation(config: DiTConfig, layout: TokenLayout) -> RotaryTable | None:
  """The rotation of queries and keys in every block; None if the model rotates none."""
  if config.positions not in ROTARY_RULES:
    return None
  grid, base = grid_of_token(layout), config.base_grid[1:]
  where = rotary_positions(config.positions, layout.coordinates, grid, base, config.interpolations)
  return rotary_table(where, layout.experts, config.head_dim)


def grid_of_token(layout: TokenLayout) -> Int[Array, "b n 3"]:
  """The grid of each token's clip."""
  return jnp.take_along_axis(layout.grids, layout.segment_ids[..., None], axis=1)
