"""Divides a training of the VAE into its stages (paper 2.1), and says what each of them changes.

The weights, their average and the moments of all optimizers pass from stage to stage.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import optax
from jax.sharding import Mesh

from cogvideox_jax import sharding
from cogvideox_jax.config.vae_schema import VAEStageConfig, VAETrainConfig
from cogvideox_jax.data import buckets
from cogvideox_jax.errors import UserError
from cogvideox_jax.models import vae_config
from cogvideox_jax.training import optimizer, stages
from cogvideox_jax.training.stages import Stage

# The stage of a config without stages.
ONLY = "vae"


class VAEStage(NamedTuple):
  """A stage, and the values of the config that hold in it."""

  stage: Stage
  config: VAEStageConfig  # Nothing in it is empty but `learning_rate`, which may be 0.


def plan(config: VAETrainConfig) -> tuple[VAEStage, ...]:
  """Returns the stages in the order of their names, which is the order of training.

  Raises:
    UserError: there are fewer updates than stages.
  """
  whole = VAEStageConfig((), (), frames=0, batch_multiple=0, context=1, share=1, learning_rate=0)
  given = config.stages or {ONLY: whole}
  divided = stages.divide({name: stage.share for name, stage in given.items()}, config.train.steps)
  return tuple(VAEStage(stage, _filled(config, given[stage.name])) for stage in divided)


def check(config: VAETrainConfig) -> None:
  """Raises a UserError for sizes of no VAE, clips that it does not take, or too long a warm-up."""
  vae_config.check(config.model)
  data = config.data
  if slower := [rate for rate in data.more_fps if rate <= data.fps]:
    raise UserError(
      f"config.data.more_fps has {slower[0]:g}, which is not above config.data.fps={data.fps:g}.\n"
      "Let config.data.fps be the slowest of the rates."
    )
  for stage in plan(config):
    where = f"config.stages.{stage.stage.name}: " if config.stages else ""
    try:
      buckets.check(
        stage.config.sizes,
        stage.config.durations,
        multiple_of=config.model.spatial_compression,
      )
      buckets.check_restored(stage.config.durations, config.model.temporal_compression)
    except UserError as error:
      raise UserError(f"{where}{error}") from error
    learning_rate(config, stage)


def learning_rate(config: VAETrainConfig, stage: VAEStage) -> optax.Schedule:
  """Returns the VAE's schedule in a stage, as a function of the updates of the whole run."""
  peak, alone = stage.config.learning_rate, len(config.stages) < 2
  return stages.schedule_of(stage.stage, config.optimizer, peak, alone=alone)


def make_mesh(config: VAETrainConfig, stage: VAEStage, devices: Sequence[Any]) -> Mesh:
  """Makes the mesh of a stage over these devices."""
  sizes = dataclasses.asdict(config.mesh)
  return sharding.make_mesh(sharding.with_context(sizes, stage.config.context, devices), devices)


def gan_start(config: VAETrainConfig) -> int:
  """Returns the updates of the run before the discriminator takes part."""
  return optimizer.updates_of(config.loss.gan_start, config.train.steps)


def has_adversary(config: VAETrainConfig) -> bool:
  """Returns whether a discriminator belongs to the training."""
  return config.loss.adversarial > 0


def _filled(config: VAETrainConfig, stage: VAEStageConfig) -> VAEStageConfig:
  return dataclasses.replace(
    stage,
    sizes=stage.sizes or config.data.sizes,
    durations=stage.durations or config.data.durations,
    frames=stage.frames or config.train.frames,
    batch_multiple=stage.batch_multiple or config.train.batch_multiple,
  )
