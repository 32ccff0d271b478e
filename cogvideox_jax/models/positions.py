"""Where each token stands: the published rules, on packed rows of any mix of sizes.

A token's coordinates are integers within its clip's grid of patches. A rule turns them into
floats; those become rotations of queries and keys (5B, 1.5) or a vector that is added (2B).
"""

import math

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from cogvideox_jax.types import VISION

RULES = ("sincos", "rope", "rope_index")
THETA = 10_000.0


def grid_of_token(
  grids: Int[Array, "b s 3"], segment_ids: Int[Array, "b n"]
) -> Int[Array, "b n 3"]:
  """The grid of each token's clip."""
  return jnp.take_along_axis(grids, segment_ids[..., None], axis=1)


def rescaled(
  coordinates: Int[Array, "b n 3"], grid: Int[Array, "b n 3"], base: tuple[int, int]
) -> Float[Array, "b n 3"]:
  """5B's rule: height and width are stretched over a centred crop of the `base` grid.

  diffusers `get_resize_crop_region_for_grid` and `get_3d_rotary_pos_embed` ("linspace").

  base: patches (height, width) of the size that the model was trained at.
  """
  height, width = (jnp.float32(grid[..., axis]) for axis in (1, 2))
  base_height, base_width = (jnp.float32(size) for size in base)
  tall = height / width > base_height / base_width
  size_h = jnp.where(tall, base_height, jnp.round(base_width / width * height))
  size_w = jnp.where(tall, jnp.round(base_height / height * width), base_width)
  time = jnp.float32(coordinates[..., 0])
  return jnp.stack(
    [
      time,
      _along(coordinates[..., 1], height, jnp.round((base_height - size_h) / 2), size_h),
      _along(coordinates[..., 2], width, jnp.round((base_width - size_w) / 2), size_w),
    ],
    axis=-1,
  )


def _along(index: Array, count: Array, start: Array, size: Array) -> Array:
  """The index-th of `count` even steps from start to (start + size) (count - 1) / count."""
  end = (start + size) * (count - 1) / count
  return start + index * (end - start) / jnp.maximum(count - 1, 1)


def rotary_positions(
  rule: str,
  coordinates: Int[Array, "b n 3"],
  grid: Int[Array, "b n 3"],
  base: tuple[int, int],
) -> Float[Array, "b n 3"]:
  """Positions (t, h, w) of vision tokens by the rule.

  `rope_index` is the plain index: 1.5's rule, and the extrapolation that the paper trains with
  (section 2.4).
  """
  if rule == "rope_index":
    return jnp.float32(coordinates)
  return rescaled(coordinates, grid, base)


def rotary_table(
  positions: Float[Array, "b n 3"], experts: Int[Array, "b n"], head_dim: int
) -> tuple[Float[Array, "b n half"], Float[Array, "b n half"]]:
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
  x: Float[Array, "b n heads head_dim"],
  table: tuple[Float[Array, "b n half"], Float[Array, "b n half"]],
) -> Float[Array, "b n heads head_dim"]:
  """Turns each pair of neighbouring dimensions by its angle, in fp32."""
  cos, sin = (part[:, :, None, :, None] for part in table)
  even, odd = jnp.split(rearrange(x, "b n h (half two) -> b n h half two", two=2), 2, axis=-1)
  even, odd = jnp.float32(even), jnp.float32(odd)
  turned = jnp.concatenate([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
  return rearrange(turned, "b n h half two -> b n h (half two)").astype(x.dtype)


def sincos_table(
  coordinates: Int[Array, "b n 3"],
  experts: Int[Array, "b n"],
  width: int,
  spatial_interpolation: float,
  temporal_interpolation: float,
) -> Float[Array, "b n d"]:
  """2B's added positions, as diffusers `get_3d_sincos_pos_embed`; zeros for text.

  A quarter of the channels for time, then three eighths for width, then for height.
  """
  parts = []
  for axis, channels, scale in (
    (0, width // 4, temporal_interpolation),
    (2, width // 8 * 3, spatial_interpolation),
    (1, width // 8 * 3, spatial_interpolation),
  ):
    half = channels // 2
    frequency = jnp.exp(-math.log(THETA) / half * jnp.arange(half, dtype=jnp.float32))
    angle = coordinates[..., axis, None] / scale * frequency
    parts += [jnp.sin(angle), jnp.cos(angle)]
  table = jnp.concatenate(parts, axis=-1)
  return jnp.where((experts == VISION)[..., None], table, 0.0)
