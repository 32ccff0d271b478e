"""Explicit uniform sampling: every row in its interval, every clip in its part, all uniform."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cogvideox_jax.diffusion.timesteps import explicit_uniform, uniform

STEPS, SEGMENTS = 1000, 6


@partial(jax.jit, static_argnums=(0, 2))
def draw_many(draw, clips, batches):
  """Timesteps of many batches [batches b s], each from a key of its own."""
  keys = jax.random.split(jax.random.key(0), batches)
  return jax.vmap(lambda key: draw(key, clips, SEGMENTS, STEPS))(keys)


def of_clips(timesteps, clips):
  return np.asarray(timesteps)[
    :, (np.arange(SEGMENTS) > 0) & (np.arange(SEGMENTS) <= clips[:, None])
  ]


# Row counts that divide the 1000 timesteps, that do not, and more rows than timesteps.
@pytest.mark.parametrize("rows", [7, 8, 1500])
def test_each_row_stays_in_its_interval_and_reaches_both_its_ends(rows):
  clips = jnp.full(rows, SEGMENTS - 1)
  timesteps = draw_many(explicit_uniform, clips, 400)[:, :, 1:]
  row = np.arange(rows)
  first, last = STEPS * row // rows, (STEPS * (row + 1) - 1) // rows
  np.testing.assert_array_equal(timesteps.min((0, 2)), first)
  np.testing.assert_array_equal(timesteps.max((0, 2)), last)


def test_the_largest_draw_does_not_round_into_the_next_interval(monkeypatch):
  largest = np.nextafter(np.float32(1), np.float32(0))
  monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, largest))
  for rows in (7, 8, 1500, 4096):
    timesteps = explicit_uniform(jax.random.key(0), jnp.ones(rows, jnp.int32), SEGMENTS, STEPS)
    last = (STEPS * np.arange(1, rows + 1) - 1) // rows
    np.testing.assert_array_equal(timesteps[:, 1], last)


def test_the_clips_of_a_row_share_its_interval_evenly_in_random_order():
  clips = jnp.array([5, 2, 1, 4])
  timesteps = np.asarray(draw_many(explicit_uniform, clips, 50))
  for r, count in enumerate(np.asarray(clips)):
    parts = (timesteps[:, r, 1 : count + 1] - 250 * r) // (250 / count)
    np.testing.assert_array_equal(np.sort(parts, axis=1), np.tile(np.arange(count), (50, 1)))
    orders = len(np.unique(parts, axis=0))
    assert orders >= {1: 1, 2: 2, 4: 20, 5: 30}[count]


@pytest.mark.parametrize("draw", [explicit_uniform, uniform])
def test_padding_and_empty_slots_have_timestep_zero(draw):
  clips = jnp.array([0, 2, 5, 3])
  timesteps = np.asarray(draw_many(draw, clips, 50))
  assert timesteps.shape == (50, 4, SEGMENTS)
  assert timesteps.dtype == np.int32
  for r, count in enumerate(np.asarray(clips)):
    assert not timesteps[:, r, 0].any()
    assert not timesteps[:, r, count + 1 :].any()


@pytest.mark.parametrize("draw", [explicit_uniform, uniform])
def test_all_draws_together_are_uniform(draw):
  clips = jnp.full(8, 3)
  values = np.sort(of_clips(draw_many(draw, clips, 500), np.asarray(clips)).ravel())
  expected = (values + 1) / STEPS
  distance = np.abs(np.searchsorted(values, values, side="right") / values.size - expected).max()
  assert distance < 1.63 / np.sqrt(values.size)  # Kolmogorov-Smirnov, at the 1% level.
  assert values[0] == 0
  assert values[-1] == STEPS - 1


def test_the_batch_mean_varies_far_less_than_with_plain_sampling():
  clips = np.array([2, 3, 1, 5, 4, 2, 3, 3])

  def variance(draw):
    timesteps = draw_many(draw, jnp.asarray(clips), 500)
    return of_clips(jnp.cos(timesteps / 300), clips).mean(1).var()

  assert variance(explicit_uniform) < 0.1 * variance(uniform)


def test_the_draw_is_the_same_on_any_mesh():
  clips = jnp.array([2, 3, 1, 5, 4, 2, 3, 3])
  mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
  rows = NamedSharding(mesh, P("data"))
  draw = jax.jit(explicit_uniform, static_argnums=(2, 3), out_shardings=rows)
  split = draw(jax.random.key(3), jax.device_put(clips, rows), SEGMENTS, STEPS)
  alone = explicit_uniform(jax.random.key(3), clips, SEGMENTS, STEPS)
  np.testing.assert_array_equal(split, alone)
