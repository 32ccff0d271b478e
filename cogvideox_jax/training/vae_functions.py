"""Makes the functions that a training of the VAE compiles, from its config."""

import dataclasses
from functools import partial

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Key

from cogvideox_jax import sharding
from cogvideox_jax.config.schema import VAETrainConfig
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.models.vae_config import VAEConfig
from cogvideox_jax.training import optimizer, state
from cogvideox_jax.training.state import TrainState, Updates
from cogvideox_jax.training.step_functions import Functions
from cogvideox_jax.training.vae_step import LossWeights, Network, vae_step, validation_metrics
from cogvideox_jax.types import Params


def make_vae_functions(config: VAETrainConfig, mesh: Mesh, rules: sharding.Rules) -> Functions:
  """Makes the functions of a config such as configs/vae_tiny.py.

  `train` is (state, frames, key) -> (state, metrics), `validate` (params, frames, key) -> metrics.
  Frames are bytes [b, F, H, W, 3] of one bucket.

  Raises:
    UserError: the warm-up is longer than the training, or an array does not divide over the mesh.
  """
  model = config.model
  schedule = optimizer.learning_rate(config.optimizer, config.train.steps)
  updates = Updates(
    optimizer.make_optimizer(config.optimizer, schedule), config.optimizer.ema_decay
  )
  draw = partial(_draw_params, model)
  abstract = state.abstract(jax.eval_shape(draw, jax.random.key(0)), updates, mesh, rules)
  pinned = state.shardings_of(abstract).params
  network = Network(
    graph_of(VAE, model),
    gather=partial(jax.lax.with_sharding_constraint, shardings=sharding.replicated(mesh)),
    pin=partial(jax.lax.with_sharding_constraint, shardings=pinned),
  )
  shared = {"network": network, "weights": LossWeights(**dataclasses.asdict(config.loss))}

  def create(key: Key[Array, ""]) -> TrainState:
    return state.create(draw, key, updates, abstract)

  return Functions(
    abstract=abstract,
    create=create,
    train=partial(vae_step, updates=updates, **shared),
    validate=partial(validation_metrics, **shared),
  )


def _draw_params(model: VAEConfig, key: Key[Array, ""]) -> Params:
  """Returns new parameters of the VAE."""
  return nnx.to_pure_dict(nnx.state(VAE(model, rngs=nnx.Rngs(key)), nnx.Param))
