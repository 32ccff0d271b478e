"""The published rules of positions, on packed rows of any mix of sizes.

A token's coordinates are integers within its clip's grid of patches. 2B adds a vector that is
computed from them (`sincos`). The other rules turn them into positions, which are floats, and by
which queries and keys are rotated.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary_positions(
  rule: str,
  coordinates: Int[Array, "b n 3"],
  grid: Int[Array, "b n 3"],
  base: tuple[int, int],
  interpolations: tuple[float, float] = (1.0, 1.0),
) -> Float[Array, "b n 3"]:
  """Positions (t, h, w) of vision tokens.

  Args:
    rule: a key of ROTARY_RULES.
    grid: the grid of each token's clip.
    base: patches (height, width) of the size that the model was trained at.
    interpolations: in space and in time.
  """
  return ROTARY_RULES[rule](coordinates, grid, base, interpolations)


def rescaled(
  coordinates: Int[Array, "b n 3"], grid: Int[Array, "b n 3"], base: tuple[int, int]
) -> Float[Array, "b n 3"]:
  """Stretches height and width over a centred crop of the `base` grid.

  diffusers `get_resize_crop_region_for_grid` and `get_3d_rotary_pos_embed` ("linspace").
  """
  height, width = (jnp.float32(grid[..., axis]) for axis in (1, 2))
  along_h, along_w = crop((height, width), base)
  time = jnp.float32(coordinates[..., 0])
  h = _along(coordinates[..., 1], height, *along_h)
  w = _along(coordinates[..., 2], width, *along_w)
  return jnp.stack([time, h, w], axis=-1)


def crop(
  grid: tuple[Float[Array, "*b"], Float[Array, "*b"]] | tuple[int, int], base: tuple[int, int]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
  """(start, size) along height and width of the largest crop of `base` that has the grid's shape.

  The crop is centred and rounded to whole patches, halves to even ones.
  """
  height, width = (jnp.float32(size) for size in grid)
  base_height, base_width = (jnp.float32(size) for size in base)
  tall = height / width > base_height / base_width
  size_h = jnp.where(tall, base_height, jnp.round(base_width / width * height))
  size_w = jnp.where(tall, jnp.round(base_height / height * width), base_width)
  top, left = jnp.round((base_height - size_h) / 2), jnp.round((base_width - size_w) / 2)
  return (top, size_h), (left, size_w)


def _along(index: Array, count: Array, start: Array, size: Array) -> Array:
  """The index-th of `count` even steps from start to (start + size) (count - 1) / count."""
  end = (start + size) * (count - 1) / count
  return start + index * (end - start) / jnp.maximum(count - 1, 1)


def interpolated(
  coordinates: Int[Array, "b n 3"], interpolations: tuple[float, float]
) -> Float[Array, "b n 3"]:
  """Divides the coordinates by the interpolations in space and time, as `sincos` does."""
  space, time = interpolations
  return coordinates / jnp.array([time, space, space], jnp.float32)


# Functions of the coordinates, the grid of each token's clip, the base grid and the interpolations.
# `rope` is 5B's rule. `rope_index` is 1.5's, and the extrapolation that the paper trains with
# (section 2.4).
ROTARY_RULES: dict[str, Callable[..., Float[Array, "b n 3"]]] = {
  "rope": lambda coordinates, grid, base, _: rescaled(coordinates, grid, base),
  "rope_index": lambda coordinates, *_: jnp.float32(coordinates),
  "rope_scaled": lambda coordinates, _grid, _base, scales: interpolated(coordinates, scales),
}
RULES = ("sincos", *ROTARY_RULES)
