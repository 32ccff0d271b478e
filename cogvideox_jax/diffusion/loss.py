"""The training loss: the squared error of v, over the vision tokens of all clips alike."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from cogvideox_jax.diffusion import timesteps as sampling
from cogvideox_jax.diffusion.latents import LatentConfig, Latents, draw_latents
from cogvideox_jax.diffusion.noise import NoiseSchedule, add_noise, velocity
from cogvideox_jax.types import VISION, Batch

# The network with its parameters and everything it is told about the batch: noised vision patches,
# those of an image behind them if it sees one, and the timestep of every segment -> v.
Denoise = Callable[[Float[Array, "b n seen"], Int[Array, "b s"]], Float[Array, "b n p"]]


def diffusion_loss(
  denoise: Denoise,
  batch: Batch,
  schedule: NoiseSchedule,
  key: Key[Array, ""],
  *,
  latents: LatentConfig,
  explicit_uniform: bool,
) -> Float[Array, ""]:
  """The loss of one global batch, at timesteps, latents and noise that the key draws.

  Args:
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
  return v_loss(denoise, draw_latents(batch, latent_key, latents), timesteps, batch, schedule)


def validation_loss(
  denoise: Denoise,
  batch: Batch,
  schedule: NoiseSchedule,
  key: Key[Array, ""],
  timestep: int | Int[Array, ""],
  *,
  latents: LatentConfig,
) -> Float[Array, ""]:
  """The loss with every clip at one timestep, as the paper's Table 9 reports it; images all seen.

  The same key gives the same noise, so that losses of different weights can be compared.
  """
  drawn = draw_latents(batch, key, latents._replace(image_drop_rate=0.0))
  timesteps = jnp.full(batch.grids.shape[:2], timestep, jnp.int32)
  return v_loss(denoise, drawn, timesteps, batch, schedule)


def v_loss(
  denoise: Denoise,
  latents: Latents,
  timesteps: Int[Array, "b s"],
  batch: Batch,  # Says which tokens are whose: segment_ids, experts.
  schedule: NoiseSchedule,
) -> Float[Array, ""]:
  """The squared error of v summed over real vision tokens, divided by their numbers' count.

  A mean over the global batch, not of means: long and short clips, full and half-empty rows count
  by their tokens, and any mesh gives the same number. Weighting the error of x0 by 1 / (1 - alpha),
  as the published code does, is the same loss. Extra latent frames in front count as any other: a
  sampler denoises them by the network's own v, and drops them only at the end.
  """
  x0, noise, image = latents
  alpha = jnp.take_along_axis(schedule.alpha(timesteps), batch.segment_ids, axis=1)[..., None]
  seen = add_noise(x0, noise, alpha)
  if image is not None:
    seen = jnp.concatenate([seen, image], axis=-1)
  v = denoise(seen, timesteps)
  error = v.astype(jnp.float32) - velocity(x0, noise, alpha)
  counts = (batch.segment_ids > 0) & (batch.experts == VISION)
  squares = jnp.where(counts[..., None], jnp.square(error), 0)
  return squares.sum() / (jnp.maximum(counts.sum(), 1) * x0.shape[-1])
