"""One update of the real transformer: the same on any mesh, and for any packing of the clips."""

import dataclasses
import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import DIT_CONFIG, NOISE, draw, v_loss

from cogvideox_jax import sharding
from cogvideox_jax.data.packing import pack, stack
from cogvideox_jax.diffusion.latents import LatentConfig, draw_latents
from cogvideox_jax.diffusion.noise import noise_schedule
from cogvideox_jax.diffusion.objective import Objective
from cogvideox_jax.models.attention import attention
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.rematerialization import REMAT
from cogvideox_jax.sharded_attention import shard_attention
from cogvideox_jax.training import state, step
from cogvideox_jax.training.state import Updates
from cogvideox_jax.types import VISION, Example

LATENTS = LatentConfig(DIT_CONFIG.patch, scaling_factor=0.7, image_scale=0.7, image_drop_rate=0.0)
OBJECTIVE = Objective(noise_schedule(NOISE), LATENTS, True, "clips")
SGD = optax.sgd(0.1)  # With which the change of a weight is a tenth of its gradient.
KEY = jax.random.key(7)
PARAMS = draw(DiT, DIT_CONFIG)[1]
UPDATES = Updates(SGD, ema_decay=0.75)
START = UPDATES.begin(PARAMS)


def network(dtype=jnp.float32, attend=attention, config=DIT_CONFIG, remat="none"):
  return step.Network(graph_of(DiT, config, dtype=dtype, remat=remat), config.width, attend)


AT_ONCE = step.Accumulation(
  split=lambda tree: jax.tree.map(lambda x: jnp.asarray(x)[None], tree), pin=lambda grads: grads
)


def make_step(**changes):
  return partial(
    step.train_step,
    updates=UPDATES,
    learning_rate=optax.constant_schedule(1.0),
    **{"network": network(), "objective": OBJECTIVE, "accumulation": AT_ONCE, **changes},
  )


def example(seed, grid):
  rng = np.random.default_rng(seed)
  shape = (*grid, DIT_CONFIG.out_channels)
  mean, logvar = rng.normal(size=shape), rng.normal(-3, 1, size=shape)
  text = rng.normal(size=(DIT_CONFIG.text_length, DIT_CONFIG.text_width))
  arrays = (part.astype(np.float32) for part in (mean, logvar, text))
  return Example(*arrays, "", "", num_frames=0, height=0, width=0, fps=8.0)


def row(examples, tokens=40, patch=DIT_CONFIG.patch):
  return pack(examples, patch=patch, row_tokens=tokens, max_clips=3)


def batch_of(rows=8):
  clips = [[example(2 * r, (1, 4, 4)), example(2 * r + 1, (1 + r % 3, 4, 4))] for r in range(rows)]
  return stack([row(pair) for pair in clips])


@pytest.fixture(scope="module")
def run():
  """A step on one device."""
  return jax.jit(make_step())


@pytest.mark.parametrize(
  "name, sizes, microbatches",
  [
    pytest.param("fsdp", {"data": 4, "fsdp": 2}, 1, marks=pytest.mark.slow),
    ("fsdp", {"data": 2, "context": 2}, 4),
    pytest.param("fsdp", {"fsdp": 2, "context": 4}, 2, marks=pytest.mark.slow),
    ("fsdp_tensor", {"data": 2, "fsdp": 2, "tensor": 2}, 2),
    pytest.param("fsdp_tensor", {"context": 2, "tensor": 2}, 1, marks=pytest.mark.slow),
  ],
)
def test_a_sharded_step_in_any_number_of_microbatches_equals_that_of_one_device(
  run, name, sizes, microbatches
):
  batch = batch_of()
  expected, expected_metrics = jax.block_until_ready(run(START, batch, KEY))
  sizes = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1, **sizes}
  mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
  rules = sharding.rules_named(name)
  places = state.shardings_of(state.abstract(PARAMS, UPDATES, mesh, rules))
  accumulation = step.Accumulation(
    split=partial(sharding.split_rows, microbatches=microbatches, mesh=mesh, rules=rules),
    pin=partial(jax.lax.with_sharding_constraint, shardings=places.params),
  )
  attend = shard_attention(attention, mesh, rules)
  sharded_step = make_step(network=network(attend=attend), accumulation=accumulation)
  sharded_run = jax.jit(sharded_step, out_shardings=(places, None))
  places = (places, sharding.batch_shardings(batch, mesh, rules))
  # Two things at once on fake devices can deadlock.
  start, batch = jax.block_until_ready(jax.device_put((START, batch), places))
  sharded, metrics = jax.block_until_ready(sharded_run(start, batch, KEY))

  np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
  np.testing.assert_allclose(metrics["grad_norm"], expected_metrics["grad_norm"], rtol=1e-4)
  jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6), sharded.params, expected.params)


@pytest.mark.parametrize(
  "remat",
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "offload"))
    for name in REMAT
    if name != "none"
  ],
)
def test_what_is_computed_again_changes_nothing(run, remat):
  batch = batch_of()
  expected, expected_metrics = run(START, batch, KEY)
  again, metrics = jax.jit(make_step(network=network(remat=remat)))(START, batch, KEY)
  assert float(metrics["loss"]) == pytest.approx(float(expected_metrics["loss"]), rel=1e-6)
  jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), again.params, expected.params)


def products(remat):
  """How many matrix products a step takes, attention's among them."""
  text = str(jax.make_jaxpr(make_step(network=network(remat=remat)))(START, batch_of(1), KEY))
  return text.count("dot_general")


@pytest.mark.slow
def test_a_policy_spares_the_products_that_it_names():
  none, linear, branches, attend, full = map(
    products, ("none", "linear", "branches", "attention", "full")
  )
  assert none <= linear < branches == attend - 1 < full
  assert products("offload") == attend


def test_every_kernel_and_its_moments_are_spread_over_fsdp():
  mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "context": 1, "tensor": 1})
  adamw = Updates(optax.adamw(1e-3), ema_decay=0.75)
  abstract = state.abstract(PARAMS, adamw, mesh, sharding.rules_named("fsdp"))
  for path, leaf in jax.tree.leaves_with_path(abstract):
    spread = "fsdp" in jax.tree.leaves(tuple(leaf.sharding.spec))
    assert spread == sharding.path_name(path).endswith("kernel"), path


KINDS = {  # What the published models differ in.
  "5b": {"positions": "rope"},
  "5b_i2v": {"positions": "rope", "in_channels": 8, "learned_positions": True},
  "1_5": {"patch": (2, 2, 2)},
  "1_5_i2v": {"patch": (2, 2, 2), "in_channels": 8, "ofs_width": 8},
}


def certain(seed, grid, config):
  """A clip whose posteriors leave nothing to chance, with an image if the model sees one."""
  drawn = example(seed, grid)
  image = None
  if config.takes_image:
    moments = np.random.default_rng(100 + seed).normal(size=(1, 2, *drawn.mean.shape[1:]))
    image = np.where([[[[[False]]], [[[True]]]]], -30, moments).astype(np.float32)
  return drawn._replace(logvar=np.full_like(drawn.logvar, -30), image=image)


def vision_of(batch, row, segment):
  return (batch.segment_ids[row] == segment) & (batch.experts[row] == VISION)


@functools.cache
def loss_and_gradients(config):
  """A function of parameters, a batch, the noise to add to it, and timesteps."""
  settings = LATENTS._replace(patch=config.patch)

  def loss_of(params, batch, noise, timesteps):
    denoise = step.denoiser(network(config=config), params, batch)
    latents = draw_latents(batch, KEY, settings)._replace(noise=noise)
    return v_loss(denoise, latents, timesteps, batch, OBJECTIVE.schedule)

  return jax.jit(jax.value_and_grad(loss_of))


@pytest.mark.parametrize(
  "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "1_5_i2v")) for kind in KINDS]
)
def test_clips_packed_in_one_row_train_as_each_alone(kind):
  config = dataclasses.replace(DIT_CONFIG, **KINDS[kind])
  params, run = draw(DiT, config)[1], loss_and_gradients(config)
  grids = [(3, 4, 6)] * 3 if config.learned_positions else [(1, 4, 4), (3, 4, 4), (2, 4, 4)]
  clips = [certain(seed, grid, config) for seed, grid in enumerate(grids)]
  alone = stack([row([clip], tokens=80, patch=config.patch) for clip in clips])
  packed = row(clips, tokens=80, patch=config.patch)
  empty = jax.tree.map(np.zeros_like, packed)._replace(grids=np.ones_like(packed.grids))
  packed = stack([packed, empty, empty])
  noise = np.random.default_rng(3).normal(size=packed.mean.shape).astype(np.float32)
  noise_alone = np.zeros_like(alone.mean)
  for clip in range(3):  # The same noise for the same token.
    noise_alone[clip, vision_of(alone, clip, 1)] = noise[0, vision_of(packed, 0, clip + 1)]
  timesteps = np.array([[0, 100, 500, 900], [0] * 4, [0] * 4], np.int32)
  timesteps_alone = np.array([[0, t, 0, 0] for t in (100, 500, 900)], np.int32)

  loss, grads = run(params, packed, noise, timesteps)
  loss_alone, grads_alone = run(params, alone, noise_alone, timesteps_alone)
  np.testing.assert_allclose(loss, loss_alone, rtol=1e-5)
  jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), grads, grads_alone)
  for path, gradient in jax.tree.leaves_with_path(grads):  # So that nothing is left unused.
    assert np.any(gradient), sharding.path_name(path)


@pytest.mark.parametrize("frames", [1, 3])
def test_an_odd_clip_trains_as_one_whose_first_latent_was_doubled_by_hand(frames):
  config = dataclasses.replace(DIT_CONFIG, **KINDS["1_5_i2v"])
  params, run = draw(DiT, config)[1], loss_and_gradients(config)
  odd = certain(0, (frames, 4, 4), config)
  doubled = odd._replace(
    mean=np.concatenate([odd.mean[:1], odd.mean]),
    logvar=np.concatenate([odd.logvar[:1], odd.logvar]),
  )
  ours, by_hand = (row([clip], patch=config.patch) for clip in (odd, doubled))
  assert (ours.extra[0, 1], by_hand.extra[0, 1]) == (1, 0)
  noise = np.random.default_rng(3).normal(size=ours.mean.shape).astype(np.float32)
  timesteps = np.array([[0, 300, 0, 0]], np.int32)
  loss, grads = run(params, ours, noise, timesteps)
  expected, expected_grads = run(params, by_hand, noise, timesteps)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), grads, expected_grads)


def test_what_stands_in_the_padding_changes_nothing(run):
  batch = batch_of()
  padding = (batch.segment_ids == 0)[..., None]
  filled = batch._replace(mean=np.where(padding, np.float32(100), batch.mean))
  filled = filled._replace(text=np.concatenate([batch.text[:, :2], batch.text[:, 2:] + 50], axis=1))
  after, metrics = run(START, batch, KEY)
  after_filled, metrics_filled = run(START, filled, KEY)
  assert padding.any() and metrics["loss"] == metrics_filled["loss"]
  jax.tree.map(np.testing.assert_array_equal, after, after_filled)


def test_noise_is_that_of_the_step_and_the_average_follows(run):
  batch = batch_of()
  first, metrics = run(START, batch, KEY)
  again, repeated = run(START, batch, KEY)
  _, later = run(START._replace(step=jnp.int32(1)), batch, KEY)
  assert metrics["loss"] == repeated["loss"] != later["loss"]
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert int(first.step) == 1

  def check_average(ema, old, new):
    one, other = 0.1 * old, 0.9 * new  # They may cancel.
    assert (abs(ema - (one + other)) <= 1e-6 * (abs(one) + abs(other))).all()

  jax.tree.map(check_average, first.ema, PARAMS, first.params)


def test_computing_in_bfloat16_leaves_the_weights_and_the_gradients_in_float32(run):
  batch = batch_of()
  after, metrics = jax.jit(make_step(network=network(jnp.bfloat16)))(START, batch, KEY)
  exact = run(START, batch, KEY)[1]
  assert {leaf.dtype.name for leaf in jax.tree.leaves(after)} == {"float32", "int32"}
  np.testing.assert_allclose(metrics["loss"], exact["loss"], rtol=0.05)
  assert metrics["loss"] != exact["loss"]


def test_training_on_one_batch_learns_it(run):
  batch, state, losses = batch_of(), START, []
  for _ in range(40):
    state, metrics = run(state, batch, KEY)
    losses.append(float(metrics["loss"]))
  assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.slow
def test_explicit_uniform_sampling_can_be_left_out(run):
  batch = batch_of()
  objective = OBJECTIVE._replace(explicit_uniform=False)
  plain = jax.jit(make_step(objective=objective))(START, batch, KEY)[1]
  assert np.isfinite(plain["loss"]) and plain["loss"] != run(START, batch, KEY)[1]["loss"]
