"""Videos as packed rows: training's layout, with one clip in a row.

A row holds a video's text tokens, then its vision tokens, then padding.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Float

from cogvideox_jax.data.packing import pack
from cogvideox_jax.inference.step_sharding import StepSharding
from cogvideox_jax.models.dit import patchify, unpatchify
from cogvideox_jax.types import Example, TokenLayout

Patch = tuple[int, int, int]  # Latent frames, height and width of a patch.


class SampledRows(NamedTuple):
  """What the transformer reads of a step, apart from the timestep."""

  vision: Float[Array, "b n p"]  # Patches; 0 at text and padding.
  text: Float[Array, "b 1 l t"]
  layout: TokenLayout


def pack_videos(
  latents: Float[Array, "b f h w c"],  # With the channels of an image's latents if there are any.
  text: Float[Array, "halves b l t"],
  patch: Patch,
  step_sharding: StepSharding,
) -> SampledRows:
  """Packs each video with its text, for each half of guidance, and shards the rows."""
  halves, videos, text_tokens = text.shape[:3]
  tokens = text_tokens + math.prod(patch_grid(latents.shape[1:], patch))
  row_tokens = step_sharding.row_tokens(tokens)
  vision = jax.vmap(lambda clip: patchify(clip, patch))(latents)
  vision = jnp.pad(vision, ((0, 0), (text_tokens, row_tokens - tokens), (0, 0)))
  rows = SampledRows(
    vision=repeat(vision, "b n p -> (halves b) n p", halves=halves),
    text=rearrange(text, "halves b l t -> (halves b) 1 l t"),
    layout=jax.tree.map(
      lambda array: repeat(jnp.asarray(array), "1 ... -> r ...", r=halves * videos),
      clip_layout(latents.shape[1:], text_tokens, patch, row_tokens),
    ),
  )
  return jax.lax.with_sharding_constraint(rows, step_sharding.rows(rows))


def unpack_videos(
  tokens: Float[Array, "rows n p"],  # Numbers of the patches of packed rows.
  halves: int,
  text_tokens: int,
  shape: tuple[int, ...],  # Latents (f, h, w, ...).
  patch: Patch,
) -> Float[Array, "halves b f h w c"]:
  """Turns the vision tokens of `pack_videos`' rows back into latents, in fp32."""
  grid = patch_grid(shape, patch)
  vision = tokens[:, text_tokens : text_tokens + math.prod(grid)].astype(jnp.float32)
  clips = jax.vmap(lambda clip: unpatchify(clip, patch, grid))(vision)
  return rearrange(clips, "(halves b) f h w c -> halves b f h w c", halves=halves)


def clip_layout(
  shape: tuple[int, ...],
  text_tokens: int,
  patch: Patch,
  row_tokens: int | None = None,  # By default as many as the clip has.
) -> TokenLayout:
  """The layout of a row of one clip of latents (f, h, w, ...), as training packs it."""
  no_channels = np.zeros((*shape[:3], 0), np.float32)
  text = np.zeros((text_tokens, 0), np.float32)
  example = Example(
    no_channels, no_channels, text, "", "", num_frames=0, height=0, width=0, fps=0.0
  )
  row_tokens = row_tokens or text_tokens + math.prod(patch_grid(shape, patch))
  return pack([example], patch=patch, row_tokens=row_tokens, max_clips=1).layout


def patch_grid(shape: tuple[int, ...], patch: Patch) -> tuple[int, int, int]:
  """Patches along (t, h, w) of latents (f, h, w, ...)."""
  t, h, w = (size // step for size, step in zip(shape[:3], patch, strict=True))
  return t, h, w
