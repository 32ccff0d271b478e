"""The VAE's training steps: what they move, on any mesh and in any number of microbatches."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from typed_config import typed

from cogvideox_jax import sharding
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.models.discriminator import Discriminator
from cogvideox_jax.models.graphs import abstract, graph_of
from cogvideox_jax.training import state as states
from cogvideox_jax.training import vae_functions, vae_stages
from cogvideox_jax.training.vae_functions import make_vae_functions
from cogvideox_jax.training.vae_losses import discriminator_loss
from cogvideox_jax.training.vae_step import Sums, weighed
from configs import vae_tiny

CLIPS = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8, 3), np.uint8)
ALONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
FROZEN = {"heads": {"0": {"scale": np.float32([2.0])}}}


def mean_square(params, x, y, *, network):
  """Stands for LPIPS, whose weights not all tests need."""
  return params["heads"]["0"]["scale"] * jnp.square(x - y).mean(axis=(2, 3, 4))


@pytest.fixture(autouse=True)
def small_distance(monkeypatch):
  monkeypatch.setattr(vae_functions, "lpips", mean_square)


def make_config(**changes):
  config = vae_tiny.get_config()
  config.model.update(channels=(8,), temporal_compression=1, latent_channels=4, groups=2)
  config.data.update(clips=16, sizes=((8, 8),), durations=(5,))
  config.loss.update(perceptual=0.5, perceptual_frames=2, adversarial=0.1, gan_start=3)
  config.discriminator.model.update(channels=(8, 8), temporal_levels=1, groups=2)
  config.train.update(steps=6)
  config.optimizer.warmup_steps = 0
  return typed(config, VAETrainConfig, **changes)


@functools.cache
def start():
  """The state before the first step."""
  config = make_config()
  mesh = sharding.make_mesh(ALONE, jax.devices()[:1])
  (stage,) = vae_stages.plan(config)
  rules = sharding.rules_named("fsdp")
  functions = make_vae_functions(config, stage, mesh, rules, FROZEN)
  return jax.device_get(functions.create(jax.random.key(0)))


@functools.cache
def make_step(devices, adversarial=True, microbatches=1, adaptive=False, weight=0.1, **sizes):
  """A compiled step on a mesh of so many devices, and the state before it."""
  config = make_config(
    train__microbatches=microbatches, loss__adaptive=adaptive, loss__adversarial=weight
  )
  mesh = sharding.make_mesh({**ALONE, **sizes}, jax.devices()[:devices])
  rules = sharding.rules_named("fsdp")
  (stage,) = vae_stages.plan(config)
  functions = make_vae_functions(config, stage, mesh, rules, FROZEN, adversarial=adversarial)
  shardings = states.shardings_of(functions.abstract)
  before = jax.block_until_ready(jax.device_put(start(), shardings))
  frames = jax.device_put(CLIPS, sharding.row_sharding(mesh, rules, len(CLIPS)))
  step = jax.jit(functions.train, out_shardings=(shardings, None))
  return before, lambda state: jax.block_until_ready(step(state, frames, jax.random.key(1)))


@functools.cache
def step_on(devices, *args, **named):
  """The state before and after a step on CLIPS, and its metrics, on a mesh of so many devices."""
  before, step = make_step(devices, *args, **named)
  return before, *step(before)


def moments(state, name):
  """The first moments of a network's optimizer, a part of its clipped gradients after one step."""
  return state.opt_state[name][1][0].mu


def same(x, y):
  jax.tree.map(np.testing.assert_array_equal, x, y)


def test_before_its_start_the_discriminator_keeps_its_bits_and_the_vae_feels_nothing_of_it():
  before, after, metrics = step_on(1, adversarial=False)
  same(after.params["discriminator"], before.params["discriminator"])
  same(after.opt_state["discriminator"], before.opt_state["discriminator"])
  assert not metrics.keys() & {"generator", "discriminator"}
  _, with_it, _ = step_on(1)
  differences = jax.tree.map(
    lambda x, y: float(jnp.abs(x - y).max()), moments(after, "vae"), moments(with_it, "vae")
  )
  assert max(jax.tree.leaves(differences)) > 1e-5


def test_every_parameter_of_both_networks_gets_a_gradient_and_only_the_vae_is_averaged():
  before, after, metrics = step_on(1)
  for name in ("vae", "discriminator"):
    for path, moment in jax.tree.leaves_with_path(moments(after, name)):
      # A constant added to all logits lowers one hinge as much as it raises the other.
      cancels = (name, sharding.path_name(path)) == ("discriminator", "conv_out/bias")
      assert cancels or np.any(moment), (name, sharding.path_name(path))
  assert jax.tree.structure(after.ema) == jax.tree.structure(before.params["vae"])
  assert jax.tree.structure(after.frozen) == jax.tree.structure(FROZEN)
  assert all(np.isfinite(x) for x in metrics.values())


def test_a_discriminator_with_the_penalty_learns_to_tell_clips_from_smooth_ones():
  """The penalty takes the gradient of a gradient."""
  model = make_config().discriminator.model
  graphdef, params = graph_of(Discriminator, model), abstract(Discriminator, model)[1]
  rng, tx = np.random.default_rng(1), optax.adam(1e-2)
  params = jax.tree.map(lambda x: np.float32(rng.normal(scale=0.2, size=x.shape)), params)
  real = jnp.float32(CLIPS) / 127.5 - 1
  fake = jnp.broadcast_to(real.mean(axis=(2, 3), keepdims=True), real.shape)

  @jax.jit
  def step(params, opt_state):
    def loss(params):
      return discriminator_loss(nnx.merge(graphdef, params), real, fake, 0.5)

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, value, metrics

  state, values = (params, tx.init(params)), []
  for _ in range(40):
    *state, value, metrics = step(*state)
    values.append(float(value))
  assert metrics["r1"] > 0
  assert metrics["logits_real"] > metrics["logits_fake"] + 0.5
  assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize(
  ("adaptive", "microbatches", "devices", "sizes"),
  [
    (False, 2, 4, {"fsdp": 2, "context": 2}),
    pytest.param(False, 1, 4, {"data": 2, "fsdp": 2}, marks=pytest.mark.slow),
    pytest.param(True, 2, 1, {}, marks=pytest.mark.slow),
  ],
)
def test_a_step_on_a_mesh_in_microbatches_has_the_numbers_of_one_device_at_once(
  adaptive, microbatches, devices, sizes
):
  before, after, metrics = step_on(devices, True, microbatches, adaptive, **sizes)
  shards = sizes.get("fsdp", 1) * sizes.get("context", 1)
  for path, leaf in jax.tree.leaves_with_path(before.params):
    if sharding.path_name(path).endswith(("conv1/kernel", "conv2/kernel")):
      assert len({str(x.index) for x in leaf.addressable_shards}) == shards, path
  _, expected, expected_metrics = step_on(1, True, 1, adaptive)
  assert metrics.keys() == expected_metrics.keys()
  for name in expected_metrics:
    np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=5e-5, err_msg=name)
  for name in ("vae", "discriminator"):
    compare = partial(np.testing.assert_allclose, atol=1e-6, rtol=2e-4)
    jax.tree.map(compare, moments(after, name), moments(expected, name))


def layer(*numbers):
  return {"decoder": {"conv_out": {"kernel": np.float32(numbers)}}}


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_of_the_last_layer():
  adversary = vae_functions.adversary_of(make_config(loss__adaptive=True))
  grads = {"vae": layer(3, 4), "discriminator": layer(7, 7)}
  sums = Sums({}, grads, {"vae": layer(0, 0.5)})
  weight, total = weighed(sums, adversary)
  np.testing.assert_allclose(weight, 0.1 * 5 / 0.5, rtol=1e-3)
  np.testing.assert_allclose(total["vae"]["decoder"]["conv_out"]["kernel"], [3, 4 + weight * 0.5])
  same(total["discriminator"], grads["discriminator"])
  vanished, _ = weighed(Sums({}, grads, {"vae": layer(0, 0)}), adversary)
  assert vanished == np.float32(0.1 * 1e4)  # The bound.


@pytest.mark.slow
def test_the_adaptive_step_is_the_fixed_one_with_the_weight_that_it_found():
  _, after, metrics = step_on(1, True, 1, True)
  _, expected, fixed = step_on(1, weight=float(metrics["generator_weight"]))
  assert metrics["generator_weight"] != np.float32(0.1)
  np.testing.assert_allclose(metrics["loss"], fixed["loss"], rtol=1e-5)
  compare = partial(np.testing.assert_allclose, atol=1e-6, rtol=2e-4)
  jax.tree.map(compare, moments(after, "vae"), moments(expected, "vae"))
