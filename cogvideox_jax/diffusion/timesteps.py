"""Draws the timestep that each clip of a training batch is noised to.

Both draws depend only on the key and the global batch, not on how the batch is split over devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key


def explicit_uniform(
  key: Key[Array, ""],
  clips: Int[Array, "b"],  # The number of clips in each row of the global batch.
  segments: int,  # The most clips of a row, plus one for padding.
  steps: int,
) -> Int[Array, "b s"]:
  """Draws timesteps in [0, steps) that are spread evenly over the batch: explicit uniform sampling.

  The published system gives each data-parallel rank its own interval (arXiv:2408.06072, section
  2.5). Here row r of R draws from the r-th of R equal intervals, so that any number of devices that
  hold rows in order have their own intervals too. A row's interval is divided again among its
  clips, in random order. A clip's timestep is still uniform, because rows come shuffled.

  Returns:
    A timestep for each segment; 0 if there is no clip.
  """
  order_key, inside_key = jax.random.split(key)
  rows = clips.shape[0]
  is_clip = _is_clip(clips, segments)
  lot = jnp.where(is_clip, jax.random.uniform(order_key, is_clip.shape), 2.0)
  rank = (lot[:, :, None] > lot[:, None, :]).sum(2)  # A random order of 0..clips-1 in each row.
  inside = jax.random.uniform(inside_key, is_clip.shape)
  within_row = (rank + inside) / jnp.maximum(clips[:, None], 1)

  # This is floor(steps * (row + within_row) / rows). The row's interval is computed in integers,
  # because float32 would round some draws into the next row's interval.
  start, remainder = np.divmod(steps * np.arange(rows)[:, None], rows)
  end = (steps * np.arange(1, rows + 1)[:, None] - 1) // rows
  offset = jnp.floor((remainder + steps * within_row) / rows).astype(jnp.int32)
  return jnp.where(is_clip, jnp.minimum(start + offset, end), 0)


def uniform(
  key: Key[Array, ""], clips: Int[Array, "b"], segments: int, steps: int
) -> Int[Array, "b s"]:
  """Draws each clip's timestep in [0, steps) by itself, to compare with `explicit_uniform`."""
  is_clip = _is_clip(clips, segments)
  return jnp.where(is_clip, jax.random.randint(key, is_clip.shape, 0, steps), 0)


def _is_clip(clips: Int[Array, "b"], segments: int) -> Bool[Array, "b s"]:
  slot = jnp.arange(segments)
  return (slot > 0) & (slot <= clips[:, None])
