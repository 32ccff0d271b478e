"""Cuts videos that are too large for the VAE into overlapping tiles, and blends the overlaps.

As diffusers `AutoencoderKLCogVideoX.tiled_encode` and `tiled_decode`, with sizes truncated to whole
pixels and latents in the same places. Each tile goes through the VAE with all its frames, alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from cogvideox_jax.errors import UserError

ROWS, COLUMNS = 2, 3  # The axes of height and width.

Run = Callable[[Array], Array]  # A function that encodes or decodes one tile.


class Side(NamedTuple):
  """The tiles along one axis."""

  pixels: int  # Size of a tile.
  latents: int  # The same size in latents.
  overlap: float  # Share of a tile that overlaps the next one, in 0..1.

  @property
  def encode(self) -> tuple[int, int, int, int]:
    """Pixels of a tile and from tile to tile; latents to blend, and latents to keep of a tile."""
    blend = int(self.latents * self.overlap)
    return self.pixels, int(self.pixels * (1 - self.overlap)), blend, self.latents - blend

  @property
  def decode(self) -> tuple[int, int, int, int]:
    """Latents of a tile and from tile to tile; pixels to blend, and pixels to keep of a tile."""
    blend = int(self.pixels * self.overlap)
    return self.latents, int(self.latents * (1 - self.overlap)), blend, self.pixels - blend


class Tiling(NamedTuple):
  """How a video is cut into tiles."""

  height: Side
  width: Side

  @classmethod
  def of(cls, height: int, width: int, compression: int) -> "Tiling":
    """Tiles of height x width pixels, with the overlaps of diffusers: a sixth and a fifth.

    compression: pixels to a latent, along each side.

    Raises:
      UserError: the tiles do not meet once they are truncated to whole latents. The reference then
        returns a result of another size than the video.
    """
    sides = Side(height, height // compression, 1 / 6), Side(width, width // compression, 1 / 5)
    for side in sides:
      _, latents, _, kept_pixels = side.decode
      _, pixels, _, kept_latents = side.encode
      if (latents * compression, kept_latents * compression) != (kept_pixels, pixels):
        raise UserError(
          f"Tiles of {width}x{height} pixels do not meet, cut to latents of {compression} pixels:\n"
          "the VAE's sample_height and sample_width are not made for tiling."
        )
    return cls(*sides)

  def encode(self, run: Run, frames: Float[Array, "b F H W c"]) -> Float[Array, "b f h w z"]:
    """Encodes tile by tile; frames no larger than a tile go through `run` in one piece."""
    return _tiled(run, frames, self.height.encode, self.width.encode)

  def decode(self, run: Run, z: Float[Array, "b f h w z"]) -> Float[Array, "b F H W c"]:
    """Decodes tile by tile; latents no larger than a tile go through `run` in one piece."""
    return _tiled(run, z, self.height.decode, self.width.decode)


def _tiled(run: Run, x: Array, rows: tuple[int, ...], columns: tuple[int, ...]) -> Array:
  """Runs each tile and joins the results; rows, columns: what Side says of height and width."""
  (height, row_stride, row_blend, kept_rows) = rows
  (width, column_stride, column_blend, kept_columns) = columns
  if x.shape[ROWS] <= height and x.shape[COLUMNS] <= width:
    return run(x)
  above: list[Array] = []
  result = []
  for top in range(0, x.shape[ROWS], row_stride):
    row: list[Array] = []
    for number, left in enumerate(range(0, x.shape[COLUMNS], column_stride)):
      tile = run(x[:, :, top : top + height, left : left + width])
      # The tiles above and to the left are themselves blended, as in the reference, which blends
      # in place.
      if above:
        tile = _blend(above[number], tile, row_blend, ROWS)
      if row:
        tile = _blend(row[-1], tile, column_blend, COLUMNS)
      row.append(tile)
    kept = [tile[:, :, :kept_rows, :kept_columns] for tile in row]
    result.append(jnp.concatenate(kept, axis=COLUMNS))
    above = row
  return jnp.concatenate(result, axis=ROWS)


def _blend(before: Array, tile: Array, extent: int, axis: int) -> Array:
  """Fades the end of `before` into the beginning of `tile`."""
  extent = min(before.shape[axis], tile.shape[axis], extent)
  shape = [1] * tile.ndim
  shape[axis] = extent
  weight = (jnp.arange(extent) / max(extent, 1)).reshape(shape)
  end = jnp.take(before, jnp.arange(before.shape[axis] - extent, before.shape[axis]), axis)
  start, rest = jnp.split(tile, [extent], axis)
  return jnp.concatenate([end * (1 - weight) + start * weight, rest], axis)
