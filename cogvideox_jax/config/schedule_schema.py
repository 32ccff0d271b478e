"""Keys of a training config that say how long to train, and how updates move the weights.

See `config/schema.py` for the whole config and for what the sources' names mean.
"""

from dataclasses import dataclass, field

from cogvideox_jax.config_keys import AT_LEAST_ZERO, FRACTION, Range, key
from cogvideox_jax.diffusion.objective import WEIGHTINGS

UPDATES = Range(
  "a whole number of updates, at least 0, or a fraction of them below 1",
  lambda number: 0 <= number < 1 or (number >= 1 and number == int(number)),
)
_TABLE_6 = "transformer: paper Table 6; VAE: ours"


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
  """How long to train, and what changes from stage to stage."""

  steps: int = field(metadata=key("Updates in total, over all stages.", "paper Table 5"))
  carry_optimizer: bool = field(
    default=True,
    metadata=key("Whether the next stage keeps the optimizer's moments instead of zeroing them."),
  )
  growth: str = field(
    default="extrapolate",
    metadata=key(
      "How positions change with the sizes of later stages. extrapolate: a token's position is its "
      "index; interpolate: positions are divided by the ratio of the short sides.",
      "paper section 2.4",
      choices=("extrapolate", "interpolate"),
    ),
  )
  explicit_uniform: bool = field(
    metadata=key(
      "Whether each row of the batch draws its timesteps from its own interval.",
      "paper section 2.5",
    )
  )
  weighting: str = field(
    default="tokens",
    metadata=key(
      "What the loss is a mean of. clips: every clip of a batch counts the same; tokens: every "
      "vision token does, so that a long clip counts for many images.",
      "SAT and diffusers: clips",
      choices=WEIGHTINGS,
    ),
  )


@dataclass(frozen=True)
class OptimizerConfig:
  """AdamW, its schedule, and the moving average of the weights."""

  learning_rate: float = field(metadata=key("Peak learning rate, unless a stage has its own."))
  warmup_steps: int | float = field(
    metadata=key(
      "Updates of linear warm-up in each stage; below 1, a fraction of the stage's updates. With "
      "several stages, a tenth of each at most.",
      allowed=UPDATES,
    )
  )
  final_fraction: float = field(
    metadata=key("Fraction of the peak at which the cosine ends.", allowed=FRACTION)
  )
  b1: float = field(metadata=key("Decay of the first moment.", _TABLE_6, allowed=FRACTION))
  b2: float = field(metadata=key("Decay of the second moment.", _TABLE_6, allowed=FRACTION))
  eps: float = field(
    metadata=key("Added to the root of the second moment in the update's denominator.", _TABLE_6)
  )
  weight_decay: float = field(
    metadata=key(
      "Decay of kernels, multiplied with the learning rate. Biases and norms have none.",
      _TABLE_6,
      allowed=AT_LEAST_ZERO,
    )
  )
  clip_norm: float = field(
    metadata=key("Largest global norm of the gradient; larger ones are scaled to it.", _TABLE_6)
  )
  ema_decay: float = field(
    metadata=key("Decay of the moving average of the weights.", allowed=FRACTION)
  )
