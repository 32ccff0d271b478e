"""How much noise a timestep adds, and how v, x0 and the noised latents follow from one another.

`alpha` is the share of the signal's variance that is left (alphas_cumprod in diffusers), in
[0, 1]: 0 is pure noise. The three conversions take it in any shape that broadcasts.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cogvideox_jax.config_keys import key

PREDICTIONS = ("v_prediction", "epsilon", "sample")  # diffusers' names.
SPACINGS = ("trailing", "leading", "linspace")


@dataclass(frozen=True)
class NoiseConfig:
  """The schedule, under SAT's and diffusers' values: `snr_shift` is 3 for 2B, 1 for the others.

  From `prediction` on, how a model is sampled, where the defaults are what all published ones do.
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
  prediction: str = "v_prediction"  # What the network returns: v, the noise, or clean latents.
  spacing: str = "trailing"  # Which timesteps a sampler visits.
  steps_offset: int = 0  # Added to each, with `leading` spacing.
  ends_clean: bool = True  # Whether the last step leaves no noise, or as much as timestep 0 has.


class NoiseSchedule(NamedTuple):
  """The alpha of every timestep, in float64 since samplers subtract nearly equal ones."""

  alphas_cumprod: Float[np.ndarray, "steps"]
  config: NoiseConfig

  def alpha(self, timesteps: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The alpha of each timestep in [0, steps), as float32."""
    return jnp.asarray(self.alphas_cumprod, jnp.float32)[timesteps]


def betas(config: NoiseConfig) -> Float[np.ndarray, "steps"]:
  """How much of the variance each timestep replaces by noise, before shift and rescale."""
  return np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.steps) ** 2


def noise_schedule(config: NoiseConfig) -> NoiseSchedule:
  """Scaled-linear betas, then the shift, then the rescale to pure noise: this order matters."""
  alphas = np.cumprod(1 - betas(config))
  alphas = alphas / (config.snr_shift + (1 - config.snr_shift) * alphas)
  if config.zero_terminal_snr:
    root = np.sqrt(alphas)
    alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
  return NoiseSchedule(alphas, config)


def add_noise(
  x0: Float[Array, "*shape"], noise: Float[Array, "*shape"], alpha: Float[Array, "..."]
) -> Float[Array, "*shape"]:
  """The latents `x0` with their variance cut to `alpha` and filled up with `noise`."""
  return jnp.sqrt(alpha) * x0 + jnp.sqrt(1 - alpha) * noise


def velocity(
  x0: Float[Array, "*shape"], noise: Float[Array, "*shape"], alpha: Float[Array, "..."]
) -> Float[Array, "*shape"]:
  """What the network learns to return, v (arXiv:2202.00512)."""
  return jnp.sqrt(alpha) * noise - jnp.sqrt(1 - alpha) * x0


def x0_from_v(
  x: Float[Array, "*shape"], v: Float[Array, "*shape"], alpha: Float[Array, "..."]
) -> Float[Array, "*shape"]:
  """The clean latents that the noised `x` and its `v` imply."""
  return jnp.sqrt(alpha) * x - jnp.sqrt(1 - alpha) * v
