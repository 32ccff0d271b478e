"""The stages of a run (paper 3.1): which updates are whose, and what changes from one to the next.

`config.train.steps` counts the updates of the whole run; each stage has its share of them. Weights
and their average go on from stage to stage, and so do the optimizer's moments, if
`config.train.carry_optimizer` says so. Learning rate, data, batch, mesh and positions are the
stage's own.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import optax

from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.training import optimizer
from cogvideox_jax.training.state import TrainState, shardings_of

WARMUP_PART = 10  # Of several stages, each warms up over at most one part in so many; ours.


class Stage(NamedTuple):
  """A stage's place in the run."""

  name: str
  start: int  # Updates of the run that are done before it,
  end: int  # and once it is over.

  @property
  def steps(self) -> int:
    return self.end - self.start


def plan(config: TrainConfig) -> tuple[Stage, ...]:
  """The stages in turn, which is the order of their names.

  The updates up to a stage's end are its share and those before it, of `config.train.steps`,
  rounded; but every stage has one at least.

  Raises:
    UserError: there are fewer updates than stages.
  """
  names, steps = sorted(config.stages), config.train.steps
  if steps < len(names):
    raise UserError(
      f"config.train.steps is {steps}, but config.stages has {len(names)} stages "
      f"({', '.join(names)}), and each takes a step.\nGive at least {len(names)} steps."
    )
  shares = [Fraction(str(config.stages[name].share)) for name in names]
  found, start = [], 0
  for number, name in enumerate(names, 1):
    wanted = int(steps * sum(shares[:number]) / sum(shares) + Fraction(1, 2))
    end = min(max(wanted, start + 1), steps - (len(names) - number))
    found.append(Stage(name, start, end))
    start = end
  return tuple(found)


def named(config: TrainConfig, name: str) -> Stage:
  """The stage of that name."""
  return next(stage for stage in plan(config) if stage.name == name)


def going_on_at(stages: Sequence[Stage], step: int) -> Stage:
  """The stage that a run goes on with after `step` updates; the last one, if there are no more."""
  return next((stage for stage in stages if step < stage.end), stages[-1])


def trained_last(stages: Sequence[Stage], step: int) -> Stage:
  """The stage that made a checkpoint of `step` updates."""
  return next(stage for stage in stages if step <= stage.end)


def learning_rate(config: TrainConfig, name: str) -> optax.Schedule:
  """Of a stage, by the updates of the whole run: warm-up, then a cosine to the stage's last.

  Its peak is its own, or where that is 0 config.optimizer's. Where there are several stages, the
  warm-up is at most a tenth of the stage, so that a short run has all of them. The paper says that
  the decay is a cosine (Table 6), not whether it is one for all stages; one for each is ours, since
  each stage is trained until it no longer gains.
  """
  stage = named(config, name)
  own = config.optimizer
  if peak := config.stages[name].learning_rate:
    own = dataclasses.replace(own, learning_rate=float(peak))
  if len(config.stages) > 1:
    warmup_steps = min(own.warmup_steps, stage.steps // WARMUP_PART)
    own = dataclasses.replace(own, warmup_steps=warmup_steps)
  schedule = optimizer.learning_rate(own, stage.steps)
  return lambda step: schedule(step - stage.start)


def make_optimizer(config: TrainConfig, name: str) -> optax.GradientTransformation:
  """Of a stage. It counts the updates that its moments have had: those of the run, or the stage."""
  schedule = learning_rate(config, name)
  if config.train.carry_optimizer:
    return optimizer.make_optimizer(config.optimizer, schedule)
  start = named(config, name).start
  return optimizer.make_optimizer(config.optimizer, lambda count: schedule(count + start))


def enter(config: TrainConfig, stage: Stage, state: TrainState, abstract: TrainState) -> TrainState:
  """The state to begin a stage with, or to go on with inside it, placed as the stage has it.

  Unless `config.train.carry_optimizer`, a stage that begins has fresh moments and their count at 0.

  abstract: a state on the stage's mesh.
  """
  shardings = shardings_of(abstract)
  state = jax.tree.map(_moved, state, shardings)
  if config.train.carry_optimizer or stage.start == 0 or int(state.step) != stage.start:
    return state
  tx = make_optimizer(config, stage.name)
  moments = jax.jit(tx.init, out_shardings=shardings.opt_state)(state.params)
  return state._replace(opt_state=moments)


def _moved(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
  return array if array.sharding == sharding else jax.device_put(array, sharding, donate=True)


def stage_model(config: TrainConfig, name: str) -> DiTConfig:
  """The transformer as a stage trains it, and as what the stage has trained is sampled.

  With one stage it is `config.model` as it stands. With several, positions grow from stage to stage
  as `config.train.growth` says:

  - extrapolate: a token's position is its index in its own clip, at every size, so that larger
    clips reach positions that are new (paper 2.4: the front part of an expanded table; Figure 9).
    For rotary models that is `rope_index`, for sincos an interpolation of 1. At the size of the
    published models it is the published rule of the 5B, `rope`.
  - interpolate: the longest short side of a stage's sizes spans what the first stage's does: the
    index is divided by the ratio of the two. From 256 to 480 pixels this is the 1.875 of the
    published 2B. Time is not divided: a frame is as long in all stages.

  Learned positions are a table for one size (config.check), so they do not grow.
  """
  model = config.model
  if len(config.stages) == 1 or model.learned_positions:
    return model
  if config.train.growth == "extrapolate":
    if model.positions == "sincos":
      return dataclasses.replace(model, spatial_interpolation=1.0)
    return dataclasses.replace(model, positions="rope_index")
  ratio = _short_side(config, name) / _short_side(config, min(config.stages))
  rule = "sincos" if model.positions == "sincos" else "rope_scaled"
  return dataclasses.replace(model, positions=rule, spatial_interpolation=ratio)


def _short_side(config: TrainConfig, name: str) -> int:
  return max(min(size) for size in config.stages[name].sizes)
