"""The noise schedule, and the conversions between v, clean latents x0 and noised latents.

`alpha` is the fraction of the variance that is still signal (alphas_cumprod in diffusers), in
[0, 1]: 0 is pure noise. The three conversions take it in any shape that broadcasts.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cogvideox_jax.config_keys import key

# diffusers' names. The network returns v, the noise, or clean latents.
PREDICTIONS = ("v_prediction", "epsilon", "sample")
SPACINGS = ("trailing", "leading", "linspace")


@dataclass(frozen=True)
class NoiseConfig:
  """The schedule in the terms of SAT and diffusers: `snr_shift` is 3 for 2B, 1 for the others.

  The fields from `prediction` on say how a model is sampled; their defaults are what all published
  models use.
  """

  steps: int = field(metadata=key("Timesteps in training.", "SAT, published num_train_timesteps"))
  beta_start: float = field(metadata=key("First beta of the schedule.", "SAT"))
  beta_end: float = field(metadata=key("Last beta of the schedule.", "SAT"))
  snr_shift: float = field(
    metadata=key(
      "What the signal-to-noise ratio is divided by; 1 leaves it. 3 in the 2B, 1 in the 5B models.",
      "SAT shift_scale",
    )
  )
  zero_terminal_snr: bool = field(
    metadata=key("Whether the last timestep is pure noise.", "arXiv:2305.08891, SAT")
  )
  prediction: str = "v_prediction"  # What the network returns; one of PREDICTIONS.
  spacing: str = "trailing"  # Which timesteps a sampler visits; one of SPACINGS.
  steps_offset: int = 0  # Is added to each timestep of `leading` spacing.
  ends_clean: bool = True  # Whether the last step leaves no noise, or the noise of timestep 0.


class NoiseSchedule(NamedTuple):
  """The alpha of every timestep, in float64, because samplers subtract nearly equal ones."""

  alphas_cumprod: Float[np.ndarray, "steps"]
  config: NoiseConfig

  def alpha(self, timesteps: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the alpha of each timestep in [0, steps), as float32."""
    return jnp.asarray(self.alphas_cumprod, jnp.float32)[timesteps]


def betas(config: NoiseConfig) -> Float[np.ndarray, "steps"]:
  """Returns the fraction of the variance that each timestep replaces by noise, before any shift."""
  return np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.steps) ** 2


def noise_schedule(config: NoiseConfig) -> NoiseSchedule:
  """Makes the schedule: scaled-linear betas, then the shift, then the rescale to pure noise.

  The order of these matters.
  """
  alphas = np.cumprod(1 - betas(config))
  alphas = alphas / (config.snr_shift + (1 - config.snr_shift) * alphas)
  if config.zero_terminal_snr:
    root = np.sqrt(alphas)
    alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
  return NoiseSchedule(alphas, config)


def add_noise(
  x0: Float[Array, "*shape"], noise: Float[Array, "*shape"], alpha: Float[Array, "..."]
) -> Float[Array, "*shape"]:
  """Returns x0 scaled to the variance `alpha`, plus `noise` scaled to the rest of the variance."""
  return jnp.sqrt(alpha) * x0 + jnp.sqrt(1 - alpha) * noise


def velocity(
  x0: Float[Array, "*shape"], noise: Float[Array, "*shape"], alpha: Float[Array, "..."]
) -> Float[Array, "*shape"]:
  """Returns v, which the network learns to predict (arXiv:2202.00512)."""
  return jnp.sqrt(alpha) * noise - jnp.sqrt(1 - alpha) * x0


def x0_from_v(
  x: Float[Array, "*shape"], v: Float[Array, "*shape"], alpha: Float[Array, "..."]
) -> Float[Array, "*shape"]:
  """Returns the clean latents that follow from the noised latents x and their v."""
  return jnp.sqrt(alpha) * x - jnp.sqrt(1 - alpha) * v
