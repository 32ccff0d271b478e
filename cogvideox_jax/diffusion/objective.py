"""The training objective: the network predicts v of noised latents (arXiv:2202.00512).

All that another objective, such as flow matching, would replace stands in this file:

1. `draw_timesteps`: what is drawn for each clip;
2. `noised`: what the network sees of a clip's latents, and what it is to predict;
3. `squared_error`: how the errors of tokens are weighed.

The rest of the training step knows neither timesteps nor v: it passes `TimedBatch`es from
`draw_timesteps` to `loss_share`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Real

from cogvideox_jax.diffusion import timesteps as sampling
from cogvideox_jax.diffusion.latents import LatentConfig, Latents, draw_latents
from cogvideox_jax.diffusion.noise import NoiseSchedule, add_noise, velocity
from cogvideox_jax.types import VISION, Batch

# The network with its parameters and everything it is told about the batch: noised vision patches,
# those of an image behind them if it sees one, and the timestep of every segment -> its prediction.
Denoise = Callable[[Float[Array, "b n seen"], Real[Array, "b s"]], Float[Array, "b n p"]]


class Objective(NamedTuple):
  """What the loss depends on besides the network and the batch."""

  schedule: NoiseSchedule
  latents: LatentConfig
  explicit_uniform: bool  # Spread the timesteps evenly over the batch, or draw each by itself.

  def with_all_images(self) -> "Objective":
    """The same objective, but no image is dropped: for validation."""
    return self._replace(latents=self.latents._replace(image_drop_rate=0.0))


class TimedBatch(NamedTuple):
  """Rows of a global batch, all or some, and the timesteps drawn for the whole of it."""

  batch: Batch
  timesteps: Real[Array, "b s"]  # One for each segment; 0 where there is no clip.
  rows: Int[Array, "b"]  # The rows' numbers in the global batch.


def draw_timesteps(objective: Objective, batch: Batch, key: Key[Array, ""]) -> TimedBatch:
  """Draws a timestep in [0, steps) for each clip of a global batch."""
  draw = sampling.explicit_uniform if objective.explicit_uniform else sampling.uniform
  clips = jnp.max(batch.segment_ids, axis=1)
  steps = len(objective.schedule.alphas_cumprod)
  timesteps = draw(key, clips, batch.grids.shape[1], steps)
  return TimedBatch(batch, timesteps, jnp.arange(len(clips)))


def at_timestep(batch: Batch, timestep: int | Int[Array, ""]) -> TimedBatch:
  """A global batch with every clip at one timestep, as the paper's Table 9 reports losses."""
  timesteps = jnp.full(batch.grids.shape[:2], timestep, jnp.int32)
  return TimedBatch(batch, timesteps, jnp.arange(len(timesteps)))


def noised(
  x0: Float[Array, "b n p"],
  noise: Float[Array, "b n p"],
  timesteps: Real[Array, "b s"],
  segment_ids: Int[Array, "b n"],
  schedule: NoiseSchedule,
) -> tuple[Float[Array, "b n p"], Float[Array, "b n p"]]:
  """Returns what the network sees of clean latents, and the v that it is to predict."""
  alpha = jnp.take_along_axis(schedule.alpha(timesteps), segment_ids, axis=1)[..., None]
  return add_noise(x0, noise, alpha), velocity(x0, noise, alpha)


def loss_share(
  objective: Objective,
  denoise: Denoise,
  timed: TimedBatch,
  tokens: Int[Array, ""],
  key: Key[Array, ""],
) -> Float[Array, ""]:
  """Returns what rows of a global batch add to its loss.

  The loss is the squared error of v, a mean over the numbers of all real vision tokens of the
  global batch. It is not a mean of means: long and short clips, full and half-empty rows count by
  their tokens, and any mesh and any microbatches give the same number.

  Args:
    tokens: `vision_tokens` of the global batch.
    key: latents and noise are drawn with it.
  """
  latents = draw_latents(timed.batch, key, objective.latents, timed.rows)
  return squared_error(denoise, latents, timed, objective.schedule) / tokens


def squared_error(
  denoise: Denoise, latents: Latents, timed: TimedBatch, schedule: NoiseSchedule
) -> Float[Array, ""]:
  """Returns the squared error of v, summed over vision tokens: a mean over the numbers of each.

  Every timestep has the weight 1. The published code weighs the error of x0 by 1 / (1 - alpha),
  which is the same loss. Extra latent frames in front count as any other, because a sampler
  denoises them by the network's own v and drops them only at the end.
  """
  x0, noise, image = latents
  segment_ids = jnp.asarray(timed.batch.segment_ids)
  seen, target = noised(x0, noise, timed.timesteps, segment_ids, schedule)
  if image is not None:
    seen = jnp.concatenate([seen, image], axis=-1)
  v = denoise(seen, timed.timesteps)
  error = v.astype(jnp.float32) - target
  squares = jnp.where(_is_vision(timed.batch)[..., None], jnp.square(error), 0)
  return squares.sum() / x0.shape[-1]


def vision_tokens(batch: Batch) -> Int[Array, ""]:
  """The number of vision tokens, without padding; 1 if there is none."""
  return jnp.maximum(_is_vision(batch).sum(), 1)


def _is_vision(batch: Batch) -> Bool[Array, "b n"]:
  return jnp.asarray((batch.segment_ids > 0) & (batch.experts == VISION))
