"""The training loss: the squared error of v, over the vision tokens of all clips alike."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from cogvideox_jax.diffusion import timesteps as sampling
from cogvideox_jax.diffusion.noise import NoiseSchedule, add_noise, velocity
from cogvideox_jax.types import VISION, Batch

# The network with its parameters and everything it is told about the batch: noised vision patches
# [b n p] and the timestep of every segment [b s] -> v [b n p].
Denoise = Callable[[Float[Array, "b n p"], Int[Array, "b s"]], Float[Array, "b n p"]]


def diffusion_loss(
  denoise: Denoise,
  batch: Batch,
  schedule: NoiseSchedule,
  key: Key[Array, ""],
  *,
  scaling_factor: float,
  explicit_uniform: bool,
) -> Float[Array, ""]:
  """The loss of one global batch, at timesteps and noise that the key draws.

  Args:
    scaling_factor: of the VAE; brings latents to about unit variance.
    explicit_uniform: spread the timesteps evenly over the batch, or draw each by itself.
  """
  timestep_key, latent_key = jax.random.split(key)
  draw = sampling.explicit_uniform if explicit_uniform else sampling.uniform
  timesteps = draw(
    timestep_key,
    jnp.max(batch.segment_ids, axis=1),
    batch.grids.shape[1],
    len(schedule.alphas_cumprod),
  )
  x0, noise = _draw_latents(batch, latent_key, scaling_factor)
  return v_loss(denoise, x0, noise, timesteps, batch, schedule)


def validation_loss(
  denoise: Denoise,
  batch: Batch,
  schedule: NoiseSchedule,
  key: Key[Array, ""],
  timestep: int | Int[Array, ""],
  *,
  scaling_factor: float,
) -> Float[Array, ""]:
  """The loss with every clip at one timestep, as the paper's Table 9 reports it.

  The same key gives the same noise, so that losses of different weights can be compared.
  """
  x0, noise = _draw_latents(batch, key, scaling_factor)
  timesteps = jnp.full(batch.grids.shape[:2], timestep, jnp.int32)
  return v_loss(denoise, x0, noise, timesteps, batch, schedule)


def v_loss(
  denoise: Denoise,
  x0: Float[Array, "b n p"],  # Scaled latents.
  noise: Float[Array, "b n p"],  # Standard normal.
  timesteps: Int[Array, "b s"],
  batch: Batch,  # Says which tokens are whose: segment_ids, experts.
  schedule: NoiseSchedule,
) -> Float[Array, ""]:
  """The squared error of v summed over real vision tokens, divided by their numbers' count.

  A mean over the global batch, not of means: long and short clips, full and half-empty rows count
  by their tokens, and any mesh gives the same number. Weighting the error of x0 by 1 / (1 - alpha),
  as the published code does, is the same loss.
  """
  alpha = jnp.take_along_axis(schedule.alpha(timesteps), batch.segment_ids, axis=1)[..., None]
  v = denoise(add_noise(x0, noise, alpha), timesteps)
  error = v.astype(jnp.float32) - velocity(x0, noise, alpha)
  counts = (batch.segment_ids > 0) & (batch.experts == VISION)
  squares = jnp.where(counts[..., None], jnp.square(error), 0)
  return squares.sum() / (jnp.maximum(counts.sum(), 1) * x0.shape[-1])


def _draw_latents(
  batch: Batch, key: Key[Array, ""], scaling_factor: float
) -> tuple[Float[Array, "b n p"], Float[Array, "b n p"]]:
  """Returns scaled latents drawn from the VAE's posterior, and the noise to add to them."""
  posterior_key, noise_key = jax.random.split(key)
  mean, logvar = (jnp.asarray(x, jnp.float32) for x in (batch.mean, batch.logvar))
  spread = jnp.exp(jnp.clip(logvar, -30, 20) / 2)  # Clipped as the published VAE does.
  x0 = mean + spread * jax.random.normal(posterior_key, mean.shape)
  return x0 * scaling_factor, jax.random.normal(noise_key, mean.shape)
