"""AdamW with warm-up and a cosine, as the configs name them, and the average of the weights."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from cogvideox_jax import sharding
from cogvideox_jax.config.schema import OptimizerConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.training.state import Params


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


def average(ema: Params, params: Params, step: Int[Array, ""], decay: float) -> Params:
  """The moving average of the weights after an update.

  Its decay grows to `decay` from .1 (ours; as TensorFlow's averages): with a fixed one, the drawn
  weights would be most of the average for as many updates as it spans.

  step: updates done before this one.
  """
  decay_now = jnp.minimum(decay, (1 + step) / (10 + step))
  return cast(Params, optax.incremental_update(params, ema, step_size=1 - decay_now))


def decayed(params: Any) -> Any:
  """True for the arrays that weight decay pulls to zero: kernels, not biases or norms (ours).

  The paper gives the rate only (Table 6).
  """
  return jax.tree.map_with_path(lambda path, _: sharding.path_name(path).endswith("kernel"), params)
