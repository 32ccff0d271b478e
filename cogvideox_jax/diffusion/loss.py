"""The training loss: the squared error of v, over the vision tokens of all clips alike."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from cogvideox_jax.diffusion import timesteps as sampling
from cogvideox_jax.diffusion.latents import LatentConfig, Latents, draw_latents
from cogvideox_jax.diffusion.noise import NoiseSchedule, add_noise, velocity
from cogvideox_jax.types import VISION, Batch

# The network with its parameters and everything it is told about the batch: noised vision patches,
# those of an image behind them if it sees one, and the timestep of every segment -> v.
Denoise = Callable[[Float[Array, "b n seen"], Int[Array, "b s"]], Float[Array, "b n p"]]


class Part(NamedTuple):
  """Rows of a global batch, all or some, with what the whole batch decides of them."""

  batch: Batch
  timesteps: Int[Array, "b s"]
  rows: Int[Array, "b"]  # Their numbers in the global batch.


def whole(
  batch: Batch, key: Key[Array, ""], schedule: NoiseSchedule, *, explicit_uniform: bool
) -> Part:
  """A global batch with the timesteps that the key draws.

  explicit_uniform: spread the timesteps evenly over the batch, or draw each by itself.
  """
  draw = sampling.explicit_uniform if explicit_uniform else sampling.uniform
  clips = jnp.max(batch.segment_ids, axis=1)
  timesteps = draw(key, clips, batch.grids.shape[1], len(schedule.alphas_cumprod))
  return Part(batch, timesteps, jnp.arange(len(clips)))


def diffusion_loss(
  denoise: Denoise,
  part: Part,
  tokens: Int[Array, ""],
  schedule: NoiseSchedule,
  key: Key[Array, ""],
  *,
  latents: LatentConfig,
) -> Float[Array, ""]:
  """A part's share of the loss of its global batch, on latents and noise that the key draws.

  The shares of all parts sum to the loss, whatever the parts.

  Args:
    tokens: `vision_tokens` of the global batch.
  """
  drawn = draw_latents(part.batch, key, latents, part.rows)
  return squared_error(denoise, drawn, part.timesteps, part.batch, schedule) / tokens


def at_timestep(batch: Batch, timestep: int | Int[Array, ""]) -> Part:
  """A global batch with every clip at one timestep, as the paper's Table 9 reports losses."""
  timesteps = jnp.full(batch.grids.shape[:2], timestep, jnp.int32)
  return Part(batch, timesteps, jnp.arange(len(timesteps)))


def v_loss(
  denoise: Denoise,
  latents: Latents,
  timesteps: Int[Array, "b s"],
  batch: Batch,  # Says which tokens are whose: segment_ids, experts.
  schedule: NoiseSchedule,
) -> Float[Array, ""]:
  """The squared error of v, a mean over the numbers of all real vision tokens.

  A mean over the global batch, not of means: long and short clips, full and half-empty rows count
  by their tokens, and any mesh gives the same number. Weighting the error of x0 by 1 / (1 - alpha),
  as the published code does, is the same loss. Extra latent frames in front count as any other: a
  sampler denoises them by the network's own v, and drops them only at the end.
  """
  return squared_error(denoise, latents, timesteps, batch, schedule) / vision_tokens(batch)


def vision_tokens(batch: Batch) -> Int[Array, ""]:
  """How many there are, without padding; 1 if there is none."""
  return jnp.maximum(_counts(batch).sum(), 1)


def squared_error(
  denoise: Denoise,
  latents: Latents,
  timesteps: Int[Array, "b s"],
  batch: Batch,
  schedule: NoiseSchedule,
) -> Float[Array, ""]:
  """As `v_loss`, but summed over the tokens: a mean over the numbers of each."""
  x0, noise, image = latents
  alpha = jnp.take_along_axis(schedule.alpha(timesteps), batch.segment_ids, axis=1)[..., None]
  seen = add_noise(x0, noise, alpha)
  if image is not None:
    seen = jnp.concatenate([seen, image], axis=-1)
  v = denoise(seen, timesteps)
  error = v.astype(jnp.float32) - velocity(x0, noise, alpha)
  squares = jnp.where(_counts(batch)[..., None], jnp.square(error), 0)
  return squares.sum() / x0.shape[-1]


def _counts(batch: Batch) -> Bool[Array, "b n"]:
  return jnp.asarray((batch.segment_ids > 0) & (batch.experts == VISION))
