"""Explicit uniform sampling: every row in its interval, every clip in its part, all uniform."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogvideox_jax import sharding
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


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 8, 16, 64])
@pytest.mark.parametrize("rows_each", [1, 4])
def test_each_shard_draws_evenly_in_its_own_interval(shards, rows_each):
  rows = shards * rows_each
  clips = 1 + np.arange(rows) % (SEGMENTS - 1)  # Packed rows of different numbers of clips.
  timesteps = np.asarray(draw_many(explicit_uniform, jnp.asarray(clips), 1000))
  for shard in range(shards):
    here = slice(shard * rows_each, (shard + 1) * rows_each)
    # A long row of many clips counts as a short one: its draws weigh less.
    weights = np.repeat(1 / clips[here], clips[here])
    drawn = of_clips(timesteps[:, here], clips[here])
    first, end = STEPS * shard / shards, STEPS * (shard + 1) / shards
    assert np.floor(first) <= drawn.min() and drawn.max() < end
    shares, _ = np.histogram(
      np.maximum(drawn, first), 4, (first, end), weights=np.tile(weights, (1000, 1))
    )
    # A timestep counts in the interval by as much of [t, t + 1) as lies in it.
    t = np.arange(np.floor(first), end)
    inside = np.minimum(t + 1, end) - np.maximum(t, first)
    expected, _ = np.histogram(np.maximum(t, first), 4, (first, end), weights=inside)
    np.testing.assert_allclose(shares / shares.sum(), expected / expected.sum(), atol=0.08)


MESHES = [
  {"data": 1, "fsdp": 1},
  {"data": 8, "fsdp": 1},
  {"data": 1, "fsdp": 8},
  {"data": 2, "fsdp": 4},
  {"data": 2, "fsdp": 1, "tensor": 2},
  {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
]


@pytest.mark.parametrize("draw", [explicit_uniform, uniform])
def test_the_draw_is_the_same_on_any_mesh_and_each_shard_holds_its_interval(draw):
  clips = np.array([2, 3, 1, 5, 4, 2, 3, 3], np.int32)
  alone = draw(jax.random.key(3), jnp.asarray(clips), SEGMENTS, STEPS)
  for sizes in MESHES:
    sizes = {"context": 1, "tensor": 1, **sizes}
    mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    rows = sharding.row_sharding(mesh, sharding.rules_named("fsdp_tensor"), len(clips))
    run = jax.jit(draw, static_argnums=(2, 3), out_shardings=rows)
    split = jax.block_until_ready(
      run(jax.random.key(3), jax.device_put(clips, rows), SEGMENTS, STEPS)
    )
    np.testing.assert_array_equal(split, alone)
    for shard in split.addressable_shards if draw is explicit_uniform else ():
      here = shard.index[0]
      first, stop, _ = here.indices(len(clips))
      drawn = of_clips(np.asarray(shard.data)[None], clips[here])
      assert STEPS * first // 8 <= drawn.min() and drawn.max() < STEPS * stop // 8
