"""Makes AdamW with warm-up and a cosine decay from a config."""

from typing import Any

import jax
import optax

from cogvideox_jax import sharding
from cogvideox_jax.config.schema import OptimizerConfig
from cogvideox_jax.errors import UserError


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Returns a schedule: from 0 up to the peak during the warm-up, then down along a cosine.

  The cosine ends at the last step with `final_fraction` of the peak.

  Args:
    steps: updates of the whole schedule.

  Raises:
    UserError: the warm-up is longer than the run.
  """
  if not 0 <= config.warmup_steps < steps:
    raise UserError(
      f"config.optimizer.warmup_steps is {config.warmup_steps}, but config.train.steps is {steps}."
      "\nThe warm-up must be shorter than the run."
    )
  peak = config.learning_rate
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0 if config.warmup_steps else peak,
    peak_value=peak,
    warmup_steps=config.warmup_steps,
    decay_steps=steps,
    end_value=config.final_fraction * peak,
  )


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
