"""Draws the timestep that each clip of a training batch is noised to.

Both draws depend only on the key and the global batch, not on how the batch is split over devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key


def explicit_uniform(
  key: Key[Array, ""],
  clips: Int[Array, "b"],  # The number of clips in each row of the global batch.
  segments: int,  # The most clips of a row, plus one for padding.
  steps: int,
) -> Int[Array, "b s"]:
  """Draws timesteps in [0, steps) that are spread evenly over the batch: explicit uniform sampling.

  The published system gives each data-parallel rank its own interval (arXiv:2408.06072, section
  2.5). Here each of the R rows draws from one of R equal intervals. Which one is drawn anew for
  each batch by `intervals_of_rows`: a dataset may always give the same rows of a batch, and with
  fixed intervals its clips would see only some timesteps. A row's interval is divided again among
  its clips, equally and in random order. So each clip's timestep is uniform over [0, steps),
  whatever the other clips of the batch are.

  Returns:
    A timestep for each segment; 0 if there is no clip.
  """
  interval_key, order_key, inside_key = jax.random.split(key, 3)
  is_clip = _is_clip(clips, segments)
  lot = jnp.where(is_clip, jax.random.uniform(order_key, is_clip.shape), 2.0)
  rank = (lot[:, :, None] > lot[:, None, :]).sum(2)  # A random order of 0..clips-1 in each row.
  inside = jax.random.uniform(inside_key, is_clip.shape)
  within_row = (rank + inside) / jnp.maximum(clips[:, None], 1)
  timesteps = in_intervals(intervals_of_rows(interval_key, clips.shape[0]), within_row, steps)
  return jnp.where(is_clip, timesteps, 0)


def in_intervals(
  intervals: Int[Array, "b"], within: Float[Array, "b s"], steps: int
) -> Int[Array, "b s"]:
  """Returns floor(steps * (interval + within) / b): timesteps in b equal intervals of [0, steps).

  Args:
    intervals: which interval each row has, in [0, b).
    within: places in the row's interval, in [0, 1).
  """
  # The interval is computed in integers, because float32 would round some draws into the next one.
  rows = len(intervals)
  starts, remainders = np.divmod(steps * np.arange(rows), rows)
  ends = (steps * np.arange(1, rows + 1) - 1) // rows
  start, remainder, end = (jnp.asarray(x)[intervals, None] for x in (starts, remainders, ends))
  offset = jnp.floor((remainder + steps * within) / rows).astype(jnp.int32)
  return jnp.minimum(start + offset, end)


def intervals_of_rows(key: Key[Array, ""], rows: int) -> Int[Array, "{rows}"]:
  """Draws which of `rows` intervals each row of a batch has: every interval once.

  Rows that stand on one device keep to neighbouring intervals. If 2, 4, 8 ... devices hold equal
  runs of the rows, each device's intervals together are one of 2, 4, 8 ... larger intervals, as in
  the published system. If the number of rows is not a power of two, this holds for the largest
  power of two that divides it, for that times the smallest odd prime factor of the rest, and so on.
  It cannot hold for any number of devices: a row that lies in different thirds and halves of
  the batch than its neighbours could then never leave the middle.
  """
  intervals = jnp.zeros(1, jnp.int32)
  for level, factor in enumerate(_prime_factors(rows)):
    lots = jax.random.uniform(jax.random.fold_in(key, level), (len(intervals), factor))
    intervals = (factor * intervals[:, None] + jnp.argsort(lots, axis=1)).reshape(-1)
  return intervals


def uniform(
  key: Key[Array, ""], clips: Int[Array, "b"], segments: int, steps: int
) -> Int[Array, "b s"]:
  """Draws each clip's timestep in [0, steps) by itself, to compare with `explicit_uniform`."""
  is_clip = _is_clip(clips, segments)
  return jnp.where(is_clip, jax.random.randint(key, is_clip.shape, 0, steps), 0)


def _is_clip(clips: Int[Array, "b"], segments: int) -> Bool[Array, "b s"]:
  slot = jnp.arange(segments)
  return (slot > 0) & (slot <= clips[:, None])


def _prime_factors(number: int) -> list[int]:
  """Returns the prime factors of a number, the smallest first."""
  factors, factor = [], 2
  while factor * factor <= number:
    if number % factor:
      factor += 1
    else:
      factors.append(factor)
      number //= factor
  return [*factors, number] if number > 1 else factors
