"""The training objective: the network predicts v of noised latents (arXiv:2202.00512).

All that another objective, such as flow matching, would replace stands in this file:

1. `draw_timesteps`: what is drawn for each clip;
2. `noised`: what the network sees of a clip's latents, and what it is to predict;
3. `squared_error`: how the errors of timesteps, clips and tokens are weighed.

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

# What the loss is a mean of. clips: every clip of a batch counts the same, whatever its size, as in
# the published training. tokens: every vision token does, so a long clip counts for many images.
WEIGHTINGS = ("clips", "tokens")

# The network with its parameters and everything it is told about the batch: noised vision patches,
# those of an image behind them if it sees one, and the timestep of every segment -> its prediction.
Denoise = Callable[[Float[Array, "b n seen"], Real[Array, "b s"]], Float[Array, "b n p"]]


class Objective(NamedTuple):
  """What the loss depends on besides the network and the batch."""

  schedule: NoiseSchedule
  latents: LatentConfig
  explicit_uniform: bool  # Spread the timesteps evenly over the batch, or draw each by itself.
  weighting: str  # One of WEIGHTINGS.

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
  count: Int[Array, ""],
  key: Key[Array, ""],
) -> Float[Array, ""]:
  """Returns what rows of a global batch add to its loss.

  The loss is the squared error of v, a mean over the clips of the global batch, or over its real
  vision tokens, as `objective.weighting` says. It is not a mean over rows or devices, so packing,
  half-empty rows, any mesh and any microbatches give the same number.

  Args:
    count: `counted` in the global batch.
    key: latents and noise are drawn with it.
  """
  latents = draw_latents(timed.batch, key, objective.latents, timed.rows)
  error = squared_error(denoise, latents, timed, objective.schedule, objective.weighting)
  return error / count


def squared_error(
  denoise: Denoise,
  latents: Latents,
  timed: TimedBatch,
  schedule: NoiseSchedule,
  weighting: str,
) -> Float[Array, ""]:
  """Returns the squared error of v, summed over clips or vision tokens.

  The error of a token is a mean over its numbers, that of a clip a mean over its tokens. The
  published code takes the mean of each clip, then of the clips. Every timestep has the weight 1:
  the published code weighs the error of x0 by 1 / (1 - alpha), which is the same loss. Extra latent
  frames in front count as any other, because a sampler denoises them by the network's own v and
  drops them only at the end.
  """
  x0, noise, image = latents
  segment_ids = jnp.asarray(timed.batch.segment_ids)
  seen, target = noised(x0, noise, timed.timesteps, segment_ids, schedule)
  if image is not None:
    seen = jnp.concatenate([seen, image], axis=-1)
  v = denoise(seen, timed.timesteps)
  error = v.astype(jnp.float32) - target
  squares = jnp.where(_is_vision(timed.batch)[..., None], jnp.square(error), 0)
  if weighting == "clips":
    tokens = jnp.take_along_axis(_tokens_of_clips(timed.batch), segment_ids, axis=1)
    squares = squares / jnp.maximum(tokens, 1)[..., None]
  return squares.sum() / x0.shape[-1]


def counted(batch: Batch, weighting: str) -> Int[Array, ""]:
  """Returns the number of clips of a batch, or of its vision tokens without padding; at least 1."""
  if weighting == "clips":
    return jnp.maximum(jnp.max(batch.segment_ids, axis=1).sum(), 1)
  return jnp.maximum(_is_vision(batch).sum(), 1)


def _tokens_of_clips(batch: Batch) -> Int[Array, "b s"]:
  """Returns the number of vision tokens of each segment; 0 where there is no clip."""
  segments = jnp.arange(batch.grids.shape[1])
  in_segment = jnp.asarray(batch.segment_ids)[..., None] == segments
  return (in_segment & _is_vision(batch)[..., None]).sum(axis=1)


def _is_vision(batch: Batch) -> Bool[Array, "b n"]:
  return jnp.asarray((batch.segment_ids > 0) & (batch.experts == VISION))
