"""Makes AdamW with warm-up and a cosine decay from a config."""

import math
from typing import Any

import jax
import optax

from cogvideox_jax import sharding
from cogvideox_jax.config.schema import OptimizerConfig
from cogvideox_jax.errors import UserError


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Returns a schedule: up to the peak during the warm-up, then down along a cosine.

  The warm-up rises by equal steps. The first update has one of them, because it would change
  nothing at a rate of 0. The cosine falls to `final_fraction` of the peak.

  Args:
    steps: updates of the whole schedule.

  Raises:
    UserError: the warm-up is longer than the run.
  """
  warmup = warmup_steps(config, steps)
  if not 0 <= warmup < steps:
    raise UserError(
      f"config.optimizer.warmup_steps is {warmup}, but config.train.steps is {steps}."
      "\nThe warm-up must be shorter than the run. A number below 1, such as 0.03, is a fraction "
      "of it."
    )
  peak = config.learning_rate
  if not warmup:
    return optax.cosine_decay_schedule(peak, steps, alpha=config.final_fraction)
  return optax.warmup_cosine_decay_schedule(
    init_value=peak / (warmup + 1),
    peak_value=peak,
    warmup_steps=warmup,
    decay_steps=steps,
    end_value=config.final_fraction * peak,
  )


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
  """Returns the updates of the warm-up of a schedule of so many steps."""
  return updates_of(config.warmup_steps, steps)


def updates_of(wanted: int | float, steps: int) -> int:
  """Returns a number of updates that may be given as a fraction of `steps`, below 1.

  A fraction of them is rounded down, but not for the inexactness of a number such as 1/15.
  """
  return math.floor(wanted * steps + 1e-6) if 0 < wanted < 1 else int(wanted)


def make_optimizer(
  config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Returns AdamW, which is given the gradient with its global norm clipped."""
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      schedule,
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=decayed,
    ),
  )


def decayed(params: Any) -> Any:
  """Returns a tree that is true where weight decay applies: at kernels, not at biases or norms.

  The choice is ours, because the paper gives only the rate (Table 6).
  """
  return jax.tree.map_with_path(lambda path, _: sharding.path_name(path).endswith("kernel"), params)
