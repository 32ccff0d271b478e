"""Explicit uniform sampling: every row in its interval, every clip in its part, all uniform."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogvideox_jax import sharding
from cogvideox_jax.diffusion.timesteps import explicit_uniform, intervals_of_rows, uniform

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


def intervals(timesteps, number):
  """Which of `number` intervals of [0, STEPS) timesteps lie in. It must divide STEPS."""
  assert STEPS % number == 0
  return timesteps // (STEPS // number)


def check_uniform(timesteps):
  """Kolmogorov-Smirnov at the 0.1% level, for timesteps of independent batches."""
  values = np.sort(np.ravel(timesteps))
  below = np.searchsorted(values, values, side="left") / values.size
  up_to = np.searchsorted(values, values, side="right") / values.size
  distance = max((up_to - (values + 1) / STEPS).max(), (values / STEPS - below).max())
  assert distance < 1.95 / np.sqrt(values.size)


# Row counts that divide the 1000 timesteps, that do not, and more rows than timesteps.
@pytest.mark.parametrize("rows", [1, 6, 7, 8, 1500])
def test_each_interval_has_one_row_of_a_batch(rows):
  row = np.arange(rows)
  first, last = STEPS * row // rows, (STEPS * (row + 1) - 1) // rows
  timesteps = np.asarray(draw_many(explicit_uniform, jnp.full(rows, SEGMENTS - 1), 30))[:, :, 1:]
  for batch in timesteps:
    batch = batch[np.argsort(batch.sum(1))]
    assert (first[:, None] <= batch).all() and (batch <= last[:, None]).all()


@pytest.mark.parametrize("rows", [1, 6, 8])
def test_each_clip_of_each_row_is_uniform_over_the_batches(rows):
  clips = 1 + np.arange(rows) % (SEGMENTS - 1)
  timesteps = np.asarray(draw_many(explicit_uniform, jnp.asarray(clips), 300))
  for row in range(rows):
    for clip in range(1, clips[row] + 1):
      check_uniform(timesteps[:, row, clip])


def test_the_intervals_of_rows_are_independent_of_those_of_the_batch_before():
  draw = jax.vmap(intervals_of_rows, in_axes=(0, None))
  drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 4000), 4))
  pairs = np.bincount(4 * drawn[:-1, 0] + drawn[1:, 0], minlength=16) / 3999
  np.testing.assert_allclose(pairs, 1 / 16, atol=0.02)


def test_the_largest_draw_does_not_round_into_the_next_interval(monkeypatch):
  largest = np.nextafter(np.float32(1), np.float32(0))
  monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, largest))
  for rows in (7, 8, 1500):
    draw = jax.jit(partial(explicit_uniform, segments=SEGMENTS, steps=STEPS))
    timesteps = draw(jax.random.key(0), jnp.ones(rows, jnp.int32))
    last = (STEPS * np.arange(1, rows + 1) - 1) // rows  # Equal lots leave the rows in order.
    np.testing.assert_array_equal(timesteps[:, 1], last)


def test_the_clips_of_a_row_share_its_interval_evenly_in_random_order():
  clips = jnp.array([5, 2, 1, 5])  # Their parts begin at integers.
  timesteps = np.asarray(draw_many(explicit_uniform, clips, 50))
  for r, count in enumerate(np.asarray(clips)):
    of_row = timesteps[:, r, 1 : count + 1]
    parts = (of_row - 250 * intervals(of_row[:, :1], 4)) // (250 / count)
    np.testing.assert_array_equal(np.sort(parts, axis=1), np.tile(np.arange(count), (50, 1)))
    orders = len(np.unique(parts, axis=0))
    assert orders >= {1: 1, 2: 2, 5: 30}[count]


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


# Numbers of shards and rows in each: powers of two, and any number of shards with one row each.
@pytest.mark.parametrize(
  ("shards", "rows_each"),
  [(1, 4), (2, 3), (5, 1), (8, 4), (12, 5), (64, 1)],
)
def test_each_shard_draws_evenly_in_one_of_the_intervals_and_no_two_in_the_same(shards, rows_each):
  rows = shards * rows_each
  clips = 1 + np.arange(rows) % (SEGMENTS - 1)  # Packed rows of different numbers of clips.
  timesteps = np.asarray(draw_many(explicit_uniform, jnp.asarray(clips), 200))
  in_shard = np.repeat(np.arange(shards), rows_each)
  middles = np.array([timesteps[:, r, 1 : clips[r] + 1].mean(1) for r in range(rows)])
  of_rows = np.argsort(np.argsort(middles, axis=0), axis=0)  # [b batches]: each row's interval.
  held = of_rows // rows_each
  for shard in range(shards):
    assert (held[in_shard == shard] == held[in_shard == shard][:1]).all()
  assert (np.sort(held[::rows_each], axis=0) == np.arange(shards)[:, None]).all()
  assert len(np.unique(held[0])) > 0.8 * shards  # A shard does not stay in one.


MESHES = [
  {"data": 1, "fsdp": 1},
  {"data": 8, "fsdp": 1},
  {"data": 1, "fsdp": 8},
  {"data": 2, "fsdp": 4},
  {"data": 2, "fsdp": 1, "tensor": 2},
  {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
]


@pytest.mark.parametrize("draw", [explicit_uniform, pytest.param(uniform, marks=pytest.mark.slow)])
def test_the_draw_is_the_same_on_any_mesh_and_each_shard_holds_one_interval(draw):
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
    if draw is explicit_uniform:
      drawn = {
        shard.index[0].indices(8): of_clips(np.asarray(shard.data)[None], clips[shard.index[0]])
        for shard in split.addressable_shards
      }
      held = {
        rows: set(intervals(of_shard, len(drawn)).ravel()) for rows, of_shard in drawn.items()
      }
      assert sorted(map(list, held.values())) == [[shard] for shard in range(len(drawn))]
