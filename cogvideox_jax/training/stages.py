"""Divides a run into its stages (paper 3.1), and says what changes from one stage to the next.

`config.train.steps` counts the updates of the whole run; each stage has its share of them. Weights
and their average pass from stage to stage, and so do the optimizer's moments if
`config.train.carry_optimizer` is true. Each stage has its own learning rate, data, batch, mesh and
positions.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import optax

from cogvideox_jax.config.schema import OptimizerConfig, TrainConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.training import optimizer
from cogvideox_jax.training.state import TrainState, shardings_of

# If there are several stages, each warms up over at most this fraction of its steps; ours.
WARMUP_FRACTION = Fraction(1, 10)


class Stage(NamedTuple):
  """A stage, and the updates of the run that it takes."""

  name: str
  start: int  # Updates of the run that are done before the stage.
  end: int  # Updates of the run that are done after it.

  @property
  def steps(self) -> int:
    """The number of its updates."""
    return self.end - self.start


def plan(config: TrainConfig) -> tuple[Stage, ...]:
  """Returns the stages in the order of their names, which is the order of training.

  Raises:
    UserError: there are fewer updates than stages.
  """
  return divide({name: stage.share for name, stage in config.stages.items()}, config.train.steps)


def divide(shares: Mapping[str, int | float], steps: int) -> tuple[Stage, ...]:
  """Divides the updates of a run over stages, in the order of their names.

  A stage ends at the sum of the shares up to its own, as a fraction of the steps, rounded. Every
  stage has at least one update.

  Raises:
    UserError: there are fewer updates than stages.
  """
  names = sorted(shares)
  if steps < len(names):
    raise UserError(
      f"config.train.steps is {steps}, but config.stages has {len(names)} stages "
      f"({', '.join(names)}), and each takes a step.\nGive at least {len(names)} steps."
    )
  exact = [Fraction(str(shares[name])) for name in names]
  found, start = [], 0
  for number, name in enumerate(names, 1):
    wanted = int(steps * sum(exact[:number]) / sum(exact) + Fraction(1, 2))
    end = min(max(wanted, start + 1), steps - (len(names) - number))
    found.append(Stage(name, start, end))
    start = end
  return tuple(found)


def named(config: TrainConfig, name: str) -> Stage:
  """Returns the stage of that name."""
  return next(stage for stage in plan(config) if stage.name == name)


def going_on_at(stages: Sequence[Stage], step: int) -> Stage:
  """Returns the stage that a run goes on with after `step` updates; at its end, the last stage."""
  return next((stage for stage in stages if step < stage.end), stages[-1])


def trained_last(stages: Sequence[Stage], step: int) -> Stage:
  """Returns the stage that made the checkpoint of `step` updates."""
  return next(stage for stage in stages if step <= stage.end)


def learning_rate(config: TrainConfig, name: str) -> optax.Schedule:
  """Returns the schedule of a stage, as a function of the updates of the whole run."""
  peak = config.stages[name].learning_rate
  return schedule_of(named(config, name), config.optimizer, peak, alone=len(config.stages) == 1)


def schedule_of(
  stage: Stage, own: OptimizerConfig, peak: int | float, *, alone: bool
) -> optax.Schedule:
  """Returns the schedule of a stage, as a function of the updates of the whole run.

  It warms up, then follows a cosine to the stage's last update. With several stages, the warm-up is
  at most a tenth of the stage, so that the stages of a short run get past it. The paper says that
  the decay is a cosine (Table 6), not whether one cosine spans all stages; one for each is ours,
  because each stage is trained until it no longer gains.

  Args:
    peak: the stage's own peak; 0: that of `own`.
    alone: whether the run has no other stage.
  """
  if peak:
    own = dataclasses.replace(own, learning_rate=float(peak))
  if not alone:
    most = int(stage.steps * WARMUP_FRACTION)
    own = dataclasses.replace(own, warmup_steps=min(optimizer.warmup_steps(own, stage.steps), most))
  schedule = optimizer.learning_rate(own, stage.steps)
  return lambda step: schedule(step - stage.start)


def make_optimizer(config: TrainConfig, name: str) -> optax.GradientTransformation:
  """Returns the optimizer of a stage.

  It counts updates as its moments do: those of the run if moments are carried, else the stage's.
  """
  schedule = learning_rate(config, name)
  if config.train.carry_optimizer:
    return optimizer.make_optimizer(config.optimizer, schedule)
  start = named(config, name).start
  return optimizer.make_optimizer(config.optimizer, lambda count: schedule(count + start))


def enter(config: TrainConfig, stage: Stage, state: TrainState, abstract: TrainState) -> TrainState:
  """Returns the state on the stage's shardings, ready for the stage's first step or a later one.

  Unless `config.train.carry_optimizer`, a stage begins with fresh moments whose count is 0.

  Args:
    state: its buffers may be reused.
    abstract: a state's shapes and shardings on the stage's mesh.
  """
  shardings, state = shardings_of(abstract), moved(state, abstract)
  if config.train.carry_optimizer or stage.start == 0 or int(state.step) != stage.start:
    return state
  tx = make_optimizer(config, stage.name)
  moments = jax.jit(tx.init, out_shardings=shardings.opt_state)(state.params)
  return state._replace(opt_state=moments)


def moved(state: TrainState, abstract: TrainState) -> TrainState:
  """Returns the state on the shardings of an abstract one; its buffers may be reused."""

  def move(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    return array if array.sharding == sharding else jax.device_put(array, sharding, donate=True)

  return jax.tree.map(move, state, shardings_of(abstract))


def stage_model(config: TrainConfig, name: str) -> DiTConfig:
  """Returns the config of the transformer that a stage trains, and that samples with its weights.

  With one stage it is `config.model`. With several, positions grow from stage to stage by the rule
  `config.train.growth`:

  - extrapolate: at every size, a token's position is its index in its own clip. So larger clips
    reach new positions (paper 2.4: the front part of an expanded table; Figure 9). Rotary models
    then have `rope_index`, sincos models an interpolation of 1. At the size of the published models
    this equals the published rule of the 5B, `rope`.
  - interpolate: the index is divided by the ratio of the stage's longest short side to the first
    stage's, so that both span the same positions. From 256 to 480 pixels the ratio is the 1.875 of
    the published 2B. Time is not divided, because a frame lasts as long in all stages.

  If `config.init.keep` is "source", `config.model` has the rule of the weights that the training
  began with, and positions grow from that one: extrapolation leaves it, interpolation divides by
  the ratio as well. The published `rope` spans the same positions at every size by itself.

  Learned positions are a table for one size (config/), so they do not grow.
  """
  model, keeps = config.model, config.init.keep == "source"
  if len(config.stages) == 1 or model.learned_positions:
    return model
  if keeps and (config.train.growth == "extrapolate" or model.positions == "rope"):
    return model
  if config.train.growth == "extrapolate":
    if model.positions == "sincos":
      return dataclasses.replace(model, spatial_interpolation=1.0)
    return dataclasses.replace(model, positions="rope_index")
  ratio = _short_side(config, name) / _short_side(config, min(config.stages))
  rule = "sincos" if model.positions == "sincos" else "rope_scaled"
  if keeps and model.positions == rule:
    ratio *= model.spatial_interpolation
  return dataclasses.replace(model, positions=rule, spatial_interpolation=ratio)


def _short_side(config: TrainConfig, name: str) -> int:
  """Returns the longest short side of a stage's sizes, in pixels."""
  return max(min(size) for size in config.stages[name].sizes)
