"""Where each token stands: the published rules, on packed rows of any mix of sizes.

A token's coordinates are integers within its clip's grid of patches. A rule turns them into
floats; those become rotations of queries and keys (5B, 1.5) or a vector that is added (2B).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cogvideox_jax.types import TEXT, VISION

RULES = ("sincos", "rope", "rope_index", "rope_scaled")
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
  along_h, along_w = crop((height, width), base)
  time = jnp.float32(coordinates[..., 0])
  h = _along(coordinates[..., 1], height, *along_h)
  w = _along(coordinates[..., 2], width, *along_w)
  return jnp.stack([time, h, w], axis=-1)


def crop(
  grid: tuple[Float[Array, "*b"], Float[Array, "*b"]] | tuple[int, int], base: tuple[int, int]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
  """(start, size) along height and width of the largest crop of `base` that has the grid's shape.

  Centred; rounded to whole patches, halves to even ones.
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


def rotary_positions(
  rule: str,
  coordinates: Int[Array, "b n 3"],
  grid: Int[Array, "b n 3"],
  base: tuple[int, int],
  interpolations: tuple[float, float] = (1.0, 1.0),
) -> Float[Array, "b n 3"]:
  """Positions (t, h, w) of vision tokens by the rule.

  `rope_index` is the plain index: 1.5's rule, and the extrapolation that the paper trains with
  (section 2.4). `rope_scaled` divides it by the interpolations in space and time, as sincos.
  """
  if rule == "rope_index":
    return jnp.float32(coordinates)
  if rule == "rope_scaled":
    space, time = interpolations
    return coordinates / jnp.array([time, space, space], jnp.float32)
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
  cos, sin = (jnp.repeat(part, 2, axis=-1)[:, :, None] for part in table)
  # Neighbours change places in a product with 1, -1 and 0, which is exact: matrix units do that
  # in passing, while to take pairs apart and put them together goes over all tokens again.
  quarter = jnp.kron(jnp.eye(x.shape[-1] // 2), jnp.array([[0, 1], [-1, 0]])).astype(x.dtype)
  exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
  at_right_angles = jnp.einsum("bnhe,ef->bnhf", x, quarter, **exact)
  return (jnp.float32(x) * cos + at_right_angles * sin).astype(x.dtype)


def table_row(
  coordinates: Int[Array, "b n 3"],
  experts: Int[Array, "b n"],
  text_length: int,
  grid: tuple[int, int, int],
) -> Int[Array, "b n"]:
  """Where a learned table has each token of a clip of this grid: text first, then t, h, w."""
  _, height, width = grid
  t, h, w = (coordinates[..., axis] for axis in range(3))
  patch = text_length + (t * height + h) * width + w
  row = jnp.where(experts == VISION, patch, t)
  return jnp.clip(row, 0, text_length + math.prod(grid) - 1)  # Of other grids: any row.


def initial_table(
  text_length: int, grid: tuple[int, int, int], width: int, interpolations: tuple[float, float]
) -> Float[Array, "tokens d"]:
  """What a learned table starts as: zeros for text, `sincos_table` of the grid's patches.

  interpolations: in space and in time.
  """
  patches = np.indices(grid).reshape(3, -1).T
  coordinates = jnp.pad(jnp.asarray(patches), ((text_length, 0), (0, 0)))[None]
  experts = jnp.where(jnp.arange(coordinates.shape[1]) < text_length, TEXT, VISION)[None]
  return sincos_table(coordinates, experts, width, *interpolations)[0]


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
