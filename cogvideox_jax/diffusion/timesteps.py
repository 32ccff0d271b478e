"""Which timestep each clip of a training batch is noised to.

Both draws depend on the key and the global batch alone, not on how it is split over devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key


def explicit_uniform(
  key: Key[Array, ""],
  clips: Int[Array, "b"],  # How many each row of the global batch holds.
  segments: int,  # Most clips a row may hold, and one for padding.
  steps: int,
) -> Int[Array, "b s"]:
  """Timesteps in [0, steps), spread evenly over the batch: explicit uniform sampling.

  The published system gives each data-parallel rank an interval of its own (arXiv:2408.06072,
  section 2.5). Here row r of R draws in the r-th of R equal intervals, so that any number of
  devices holding rows in order have theirs too, and a row's clips each in one of as many equal
  parts of it, in random order. A clip's timestep is still uniform, as rows come shuffled. 0 where
  there is no clip.
  """
  order_key, place_key = jax.random.split(key)
  rows = clips.shape[0]
  is_clip = _is_clip(clips, segments)
  lot = jnp.where(is_clip, jax.random.uniform(order_key, is_clip.shape), 2.0)
  part = (lot[:, :, None] > lot[:, None, :]).sum(2)  # Its rank: a random order of 0..clips-1.
  inside = jax.random.uniform(place_key, is_clip.shape)
  within_row = (part + inside) / jnp.maximum(clips[:, None], 1)

  # floor(steps * (row + within_row) / rows), with the row's part in integers: a float32 would let
  # some draws slip into the next row's interval.
  start, remainder = np.divmod(steps * np.arange(rows)[:, None], rows)
  end = (steps * np.arange(1, rows + 1)[:, None] - 1) // rows
  offset = jnp.floor((remainder + steps * within_row) / rows).astype(jnp.int32)
  return jnp.where(is_clip, jnp.minimum(start + offset, end), 0)


def uniform(
  key: Key[Array, ""], clips: Int[Array, "b"], segments: int, steps: int
) -> Int[Array, "b s"]:
  """The same, each clip drawn by itself: what explicit uniform sampling is measured against."""
  is_clip = _is_clip(clips, segments)
  return jnp.where(is_clip, jax.random.randint(key, is_clip.shape, 0, steps), 0)


def _is_clip(clips: Int[Array, "b"], segments: int) -> Bool[Array, "b s"]:
  slot = jnp.arange(segments)
  return (slot > 0) & (slot <= clips[:, None])
