"""Makes the functions that a training of the transformer compiles, from its config."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Key

from cogvideox_jax import sharding
from cogvideox_jax.config.schema import StageConfig, TrainConfig
from cogvideox_jax.diffusion.noise import noise_schedule
from cogvideox_jax.diffusion.objective import Objective
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.backends import attention_for
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.graphs import compute_dtype, graph_of
from cogvideox_jax.sharded_attention import shard_attention
from cogvideox_jax.training import components, initial_weights, stages, state
from cogvideox_jax.training.guard import Guard
from cogvideox_jax.training.state import TrainState, Updates
from cogvideox_jax.training.step import Accumulation, Network, train_step, validation_step
from cogvideox_jax.types import Params
from cogvideox_jax.xla import compiler_options


class Functions(NamedTuple):
  """Functions of arrays, with everything from the config bound. None is jitted."""

  abstract: TrainState  # Shapes and shardings of a state.
  create: Callable[[Key[Array, ""]], TrainState]  # Returns a new state.
  train: Callable[..., Any]  # (state, batch, key) -> (state, metrics)
  validate: Callable[..., Any]  # (params, batch, key, timesteps) -> losses


def make_functions(config: TrainConfig, stage: str, mesh: Mesh, rules: sharding.Rules) -> Functions:
  """Makes the functions of a stage.

  Raises:
    UserError: rows or arrays do not divide over the mesh, or the warm-up is longer than the stage.
  """
  model = stages.stage_model(config, stage)
  device = mesh.devices.flat[0]
  dtype = compute_dtype(config.dtype, device.platform)
  network = Network(
    graph_of(DiT, model, dtype=dtype, remat=config.remat),
    model.width,
    shard_attention(attention_for(device), mesh, rules),
  )
  watched = {"loss": 0.0, "grad_norm": config.optimizer.clip_norm}
  updates = Updates(
    stages.make_optimizer(config, stage),
    config.optimizer.ema_decay,
    guard=Guard(watched, config.guard.spike, acts=config.guard.in_a_row > 0),
  )
  draw = partial(_draw_params, model)
  shapes = jax.eval_shape(draw, jax.random.key(0))
  abstract = state.abstract(shapes, updates, mesh, rules)
  microbatches = _microbatches(config.stages[stage], mesh, rules)
  shared = {
    "network": network,
    "objective": make_objective(config),
    "accumulation": Accumulation(
      split=partial(sharding.split_rows, microbatches=microbatches, mesh=mesh, rules=rules),
      pin=partial(jax.lax.with_sharding_constraint, shardings=state.shardings_of(abstract).params),
    ),
  }

  def create(key: Key[Array, ""]) -> TrainState:
    if not config.init_from:
      return state.create(draw, key, updates, abstract)
    params = initial_weights.load_initial(config.init_from, shapes)
    params = jax.device_put(params, state.shardings_of(abstract).params)
    return state.create(lambda given: given, params, updates, abstract)

  return Functions(
    abstract=abstract,
    create=create,
    train=partial(
      train_step,
      updates=updates,
      learning_rate=stages.learning_rate(config, stage),
      **shared,
    ),
    validate=partial(validation_step, **shared),
  )


def make_objective(config: TrainConfig) -> Objective:
  """Makes the objective; `config.components` gives the scale of the latents."""
  return Objective(
    noise_schedule(config.noise),
    components.latent_config(config),
    config.train.explicit_uniform,
    config.train.weighting,
  )


def _microbatches(stage: StageConfig, mesh: Mesh, rules: sharding.Rules) -> int:
  """Returns in how many microbatches a step computes with a batch, one after the other."""
  sharding.row_sharding(mesh, rules, stage.rows)  # Checks that the rows divide.
  rows = stage.rows // sharding.row_shards(mesh, rules)
  at_once = stage.rows_at_once or rows
  if rows % at_once:
    raise UserError(
      f"each device has {rows} rows of a batch of {stage.rows}, which a step cannot take "
      f"{at_once} at once.\nMake the stage's `rows_at_once` a divisor of {rows}, or 0 for all."
    )
  return rows // at_once


def _draw_params(model: DiTConfig, key: Key[Array, ""]) -> Params:
  """Returns new parameters of the transformer."""
  return nnx.to_pure_dict(nnx.state(DiT(model, rngs=nnx.Rngs(key)), nnx.Param))


def jit_train(functions: Functions) -> jax.stages.Wrapped:
  """Returns the jitted step of a training: (state, batch, key) -> (state, metrics).

  The state is donated, so that the next one takes its buffers.
  """
  shardings = state.shardings_of(functions.abstract)
  device, *_ = jax.tree.leaves(shardings)[0].device_set
  return jax.jit(
    functions.train,
    out_shardings=(shardings, None),
    donate_argnums=0,
    compiler_options=compiler_options(device),
  )
