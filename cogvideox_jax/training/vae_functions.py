"""Makes the functions that a training of the VAE compiles, from its config."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Key

from cogvideox_jax import sharding
from cogvideox_jax.config.vae_schema import VAELossConfig, VAETrainConfig
from cogvideox_jax.evaluation import lpips_weights
from cogvideox_jax.models.discriminator import Discriminator
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.lpips import abstract_params, lpips
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.sharded_vae import share_clips
from cogvideox_jax.training import optimizer, state, vae_initial, vae_stages
from cogvideox_jax.training.guard import Guard
from cogvideox_jax.training.state import NOTHING, TrainState, Updates
from cogvideox_jax.training.step_functions import Functions
from cogvideox_jax.training.vae_losses import LossWeights, Perceptual
from cogvideox_jax.training.vae_stages import VAEStage
from cogvideox_jax.training.vae_step import (
  DISCRIMINATOR,
  VAE_NAME,
  Adversary,
  Network,
  adversarial_step,
  reconstruct_step,
  validation_metrics,
)
from cogvideox_jax.types import Params

LPIPS_NETWORK = "vgg16"


def make_vae_functions(
  config: VAETrainConfig,
  stage: VAEStage,
  mesh: Mesh,
  rules: sharding.Rules,
  frozen: Params = NOTHING,
  *,
  adversarial: bool = False,
) -> Functions:
  """Makes the functions of a stage of a config such as configs/vae_tiny.py.

  `train` is (state, frames, key) -> (state, metrics), `validate` (params, frames, key, frozen) ->
  metrics. Frames are bytes [b, F, H, W, 3] of one bucket; `validate` takes the VAE's parameters.

  Args:
    frozen: what `load_frozen` returns, or the shapes.
    adversarial: whether `train` is the step with the discriminator, or the one before it.

  Raises:
    UserError: the warm-up is longer than the stage, or an array does not divide over the mesh.
  """
  updates = _updates(config, stage)
  draw = partial(_draw_params, config)
  shapes = jax.eval_shape(draw, jax.random.key(0))
  abstract = state.abstract(shapes, updates, mesh, rules, frozen)
  network = _network(config, mesh, rules, state.shardings_of(abstract).params)
  shared = {"network": network, "weights": _weights(config.loss)}
  step = reconstruct_step
  if adversarial:
    step = partial(adversarial_step, adversary=adversary_of(config))

  def create(key: Key[Array, ""]) -> TrainState:
    if not config.init_from:
      return state.create(draw, key, updates, abstract, frozen)
    loaded = vae_initial.load_vae(config.init_from, config.model, shapes[VAE_NAME])
    split = state.shardings_of(abstract).params[VAE_NAME]
    return state.create(
      lambda loaded: {**draw(key), VAE_NAME: loaded},
      jax.device_put(loaded, split),
      updates,
      abstract,
      frozen,
    )

  return Functions(
    abstract=abstract,
    create=create,
    train=partial(step, updates=updates, **shared),
    validate=partial(validation_metrics, **shared),
  )


def load_frozen(config: VAELossConfig) -> Params:
  """Returns the parameters that the loss reads and no step changes: those of LPIPS, if it counts.

  Raises:
    UserError: the package that holds them is missing or damaged.
  """
  return lpips_weights.lpips_params(LPIPS_NETWORK) if config.perceptual else NOTHING


def abstract_frozen(config: VAELossConfig) -> Params:
  """Returns the shapes of what `load_frozen` returns; needs no package."""
  return abstract_params(LPIPS_NETWORK) if config.perceptual else NOTHING


def _network(
  config: VAETrainConfig, mesh: Mesh, rules: sharding.Rules, shardings: Mapping[str, Any]
) -> Network:
  """shardings: of the parameters, by the names of their subtrees."""

  def pin(grads: Params) -> Params:
    split = {name: shardings[name] for name in grads}
    return jax.lax.with_sharding_constraint(grads, split)

  perceptual = None
  if config.loss.perceptual:
    distance = partial(lpips, network=LPIPS_NETWORK)
    perceptual = Perceptual(distance, config.loss.perceptual_frames)
  return Network(
    graph_of(VAE, config.model, remat=config.train.remat),
    gather=partial(jax.lax.with_sharding_constraint, shardings=sharding.replicated(mesh)),
    pin=pin,
    split=partial(
      sharding.split_rows, microbatches=config.train.microbatches, mesh=mesh, rules=rules
    ),
    share=partial(share_clips, mesh, rules, config.model.temporal_compression),
    perceptual=perceptual,
  )


def _weights(loss: VAELossConfig) -> LossWeights:
  return LossWeights(loss.l1, loss.l2, loss.kl, loss.perceptual)


def adversary_of(config: VAETrainConfig) -> Adversary:
  """Returns the discriminator of a config, without its parameters."""
  loss, discriminator = config.loss, config.discriminator
  return Adversary(
    graph_of(Discriminator, discriminator.model),
    weight=loss.adversarial,
    adaptive=loss.adaptive,
    r1=discriminator.r1,
    frames=discriminator.frames,
  )


def _updates(config: VAETrainConfig, stage: VAEStage) -> Updates:
  """Returns what moves each network. Only the VAE is averaged.

  One guard decides for both. It does not watch the whole loss, whose adversarial term may have any
  sign and changes with the discriminator.
  """
  optimizers = {
    VAE_NAME: optimizer.make_optimizer(config.optimizer, vae_stages.learning_rate(config, stage))
  }
  if vae_stages.has_adversary(config):
    optimizers[DISCRIMINATOR] = _discriminator_optimizer(config)
  norms = ("grad_norm", "discriminator_grad_norm")[: len(optimizers)]
  watched = {"l1": 0.0, **dict.fromkeys(norms, config.optimizer.clip_norm)}
  return Updates(
    optimizers,
    config.optimizer.ema_decay,
    averaged=lambda params: params[VAE_NAME],
    guard=Guard(watched, config.guard.spike, acts=config.guard.in_a_row > 0),
  )


def _discriminator_optimizer(config: VAETrainConfig) -> optax.GradientTransformation:
  """Returns an optimizer that counts the discriminator's own updates, without a warm-up."""
  own = config.discriminator
  like = dataclasses.replace(
    config.optimizer, learning_rate=own.learning_rate, warmup_steps=0, b1=own.b1, b2=own.b2
  )
  steps = max(config.train.steps - vae_stages.gan_start(config), 1)
  return optimizer.make_optimizer(like, optimizer.learning_rate(like, steps))


def _draw_params(config: VAETrainConfig, key: Key[Array, ""]) -> Params:
  """Returns new parameters of each network."""
  params = {VAE_NAME: _pure(VAE(config.model, rngs=nnx.Rngs(key)))}
  if vae_stages.has_adversary(config):
    own = nnx.Rngs(jax.random.fold_in(key, 1))
    params[DISCRIMINATOR] = _pure(Discriminator(config.discriminator.model, rngs=own))
  return params


def _pure(module: nnx.Module) -> Params:
  return nnx.to_pure_dict(nnx.state(module, nnx.Param))
