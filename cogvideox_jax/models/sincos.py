"""Positions as vectors that are added to the tokens: computed sinusoids, or a learned table."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cogvideox_jax.models.rotary import THETA
from cogvideox_jax.types import TEXT, VISION


def sincos_table(
  coordinates: Int[Array, "b n 3"],
  experts: Int[Array, "b n"],
  width: int,
  spatial_interpolation: float,
  temporal_interpolation: float,
) -> Float[Array, "b n d"]:
  """2B's vectors, as diffusers `get_3d_sincos_pos_embed` computes them; zeros for text.

  A quarter of the channels is for time, then three eighths for width, then for height.
  """
  waves = []
  for axis, channels, scale in (
    (0, width // 4, temporal_interpolation),
    (2, width // 8 * 3, spatial_interpolation),
    (1, width // 8 * 3, spatial_interpolation),
  ):
    half = channels // 2
    frequency = jnp.exp(-math.log(THETA) / half * jnp.arange(half, dtype=jnp.float32))
    angle = coordinates[..., axis, None] / scale * frequency
    waves += [jnp.sin(angle), jnp.cos(angle)]
  table = jnp.concatenate(waves, axis=-1)
  return jnp.where((experts == VISION)[..., None], table, 0.0)


def initial_table(
  text_length: int, grid: tuple[int, int, int], width: int, interpolations: tuple[float, float]
) -> Float[Array, "tokens d"]:
  """The values that a learned table starts with: zeros for text, sinusoids for the grid's patches.

  interpolations: in space and in time.
  """
  patches = np.indices(grid).reshape(3, -1).T
  coordinates = jnp.pad(jnp.asarray(patches), ((text_length, 0), (0, 0)))[None]
  experts = jnp.where(jnp.arange(coordinates.shape[1]) < text_length, TEXT, VISION)[None]
  return sincos_table(coordinates, experts, width, *interpolations)[0]


def table_row(
  coordinates: Int[Array, "b n 3"],
  experts: Int[Array, "b n"],
  text_length: int,
  grid: tuple[int, int, int],
) -> Int[Array, "b n"]:
  """The row of a learned table for each token of a clip of this grid: text first, then t, h, w.

  Tokens of clips of another grid get some row of the table.
  """
  _, height, width = grid
  t, h, w = (coordinates[..., axis] for axis in range(3))
  patch = text_length + (t * height + h) * width + w
  row = jnp.where(experts == VISION, patch, t)
  return jnp.clip(row, 0, text_length + math.prod(grid) - 1)
