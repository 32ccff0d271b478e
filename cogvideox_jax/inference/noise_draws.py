"""Random numbers of sampling: each depends on a video's seed and index, and not on its batch."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt32

from cogvideox_jax.inference.videos import Videos

# What a draw is for: 0 is a video's first latents, k the k-th step of its solver, and the last one
# the posterior of its image or video.
INITIAL, POSTERIOR = 0, 2**31 - 1

# A caller's replacement for `draw_for`: (videos, draw, shape) -> standard normal [b *shape].
Draws = Callable[[Videos, int, tuple[int, ...]], Float[Array | np.ndarray, "b ..."]]


@partial(jax.jit, static_argnames="shape")
def draw_noise(
  seeds: UInt32[Array, "b"],
  indices: UInt32[Array, "b"],  # Index of each video among those of its prompt.
  draw: Int[Array, ""],  # INITIAL, POSTERIOR, or the number of a solver's step from 1.
  shape: tuple[int, ...],
) -> Float32[Array, "b f h w c"]:
  """Standard normal latents that depend on seed, index and draw only."""

  def one(seed, index):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), draw)
    return jax.random.normal(key, shape)

  return jax.vmap(one)(seeds, indices)


def draw_for(videos: Videos, draw: int, shape: tuple[int, ...]) -> Float32[Array, "b *shape"]:
  """Draws noise of a shape for each video."""
  return draw_noise(videos.seeds, videos.indices, draw, shape)
