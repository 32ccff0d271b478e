"""AdamW with warm-up and a cosine, as the configs name them."""

from typing import Any

import jax
import optax

from cogvideox_jax import sharding
from cogvideox_jax.config.schema import OptimizerConfig
from cogvideox_jax.errors import UserError


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """From 0 to the peak over the warm-up, then along a cosine to its end at the last step.

  Args:
    steps: updates in all.

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
  """Clips the gradient's global norm, then AdamW."""
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
  """True for the arrays that weight decay pulls to zero: kernels, not biases or norms (ours).

  The paper gives the rate only (Table 6).
  """
  return jax.tree.map_with_path(lambda path, _: sharding.path_name(path).endswith("kernel"), params)
