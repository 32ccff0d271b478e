"""Draws the latents, the noise and the images of a batch; every training step draws new ones.

The latents of clips and of images are samples of the VAE's posteriors. The channels of an image
stand beside those of the noised latents: its latents in the first latent frame, zeros in all
others, as in SAT's image-to-video training and in diffusers' sampling.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from cogvideox_jax.types import VISION, Batch


class LatentConfig(NamedTuple):
  """How latents are made of the stored posteriors."""

  patch: tuple[int, int, int]  # Latent frames, height, width.
  scaling_factor: float  # The VAE's factor, which gives latents about unit variance.
  image_scale: float  # The factor for an image's latents; see VAEConfig.image_scale.
  image_drop_rate: float  # The fraction of clips whose image is replaced by zeros.


class Latents(NamedTuple):
  """What is drawn for a batch."""

  x0: Float[Array, "b n p"]  # Scaled.
  noise: Float[Array, "b n p"]  # Standard normal.
  image: Float[Array, "b n p"] | None  # Scaled; None for a model that sees no image.


def draw_latents(
  batch: Batch,
  key: Key[Array, ""],
  config: LatentConfig,
  rows: Int[Array, "b"] | None = None,
) -> Latents:
  """Draws from the posteriors, draws noise, and drops the images of some clips.

  Args:
    rows: the rows' numbers in the global batch; by default the batch is the global one. What is
      drawn for a row depends on its number, so it does not depend on how the batch is split.
  """
  rows = jnp.arange(len(batch.mean)) if rows is None else rows
  posterior_keys, noise_keys, image_keys = (
    jax.vmap(partial(jax.random.fold_in, one))(rows) for one in jax.random.split(key, 3)
  )
  x0 = _sample(batch.mean, batch.logvar, posterior_keys)
  if batch.extra is not None:
    x0 = _repeat_first_frame(x0, jnp.asarray(batch.extra), batch, config.patch)
  x0 = x0 * config.scaling_factor
  noise = _normal(noise_keys, x0.shape)
  image = None
  if batch.image is not None:
    image = _draw_image(jnp.asarray(batch.image), batch, image_keys, config)
  return Latents(x0, noise, image)


def _normal(keys: Key[Array, "b"], shape: tuple[int, ...]) -> Float[Array, "b n p"]:
  return jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(keys)


def _sample(mean: ArrayLike, logvar: ArrayLike, keys: Key[Array, "b"]) -> Float[Array, "b n p"]:
  mean, logvar = (jnp.asarray(x, jnp.float32) for x in (mean, logvar))
  spread = jnp.exp(jnp.clip(logvar, -30, 20) / 2)  # The published VAE clips so, too.
  return mean + spread * _normal(keys, mean.shape)


def _in_first_patch(batch: Batch) -> Bool[Array, "b n"]:
  """Returns which tokens are vision tokens of the first patch in time."""
  is_vision = (batch.experts == VISION) & (batch.segment_ids > 0)
  return jnp.asarray(is_vision & (batch.coordinates[..., 0] == 0))


def _repeat_first_frame(
  x0: Float[Array, "b n p"],
  extra: Int[Array, "b s"],
  batch: Batch,
  patch: tuple[int, int, int],
) -> Float[Array, "b n p"]:
  """Copies the first latent frame of each clip, drawn once, into the extra frames in front of it.

  CogVideoX 1.5 was trained so: its code repeats a latent that is already drawn. The extra frames
  are all in a clip's first patch, because they are fewer than a patch spans.
  """
  of_token = jnp.take_along_axis(extra, batch.segment_ids, axis=1)
  of_token = jnp.where(_in_first_patch(batch), of_token, 0)[..., None, None]
  t, h, w = patch
  frames = rearrange(x0, "b n (c t hw) -> t b n c hw", t=t, hw=h * w)
  for frame in reversed(range(t - 1)):
    copy = jnp.where(of_token > frame, frames[frame + 1], frames[frame])
    frames = frames.at[frame].set(copy)
  return rearrange(frames, "t b n c hw -> b n (c t hw)")


def _draw_image(
  moments: Float[Array, "b n 2 q"], batch: Batch, keys: Key[Array, "b"], config: LatentConfig
) -> Float[Array, "b n p"]:
  """Draws the latents of each clip's image, in its first latent frame; zeros elsewhere.

  They are zeros everywhere if the image is dropped.
  """
  posterior_keys, drop_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
  latents = _sample(moments[:, :, 0], moments[:, :, 1], posterior_keys) * config.image_scale
  drop = partial(jax.random.bernoulli, p=config.image_drop_rate, shape=batch.grids.shape[1:2])
  dropped = jax.vmap(drop)(drop_keys)
  dropped = jnp.take_along_axis(dropped, batch.segment_ids, axis=1)
  latents = jnp.where((_in_first_patch(batch) & ~dropped)[..., None], latents, 0)
  t, h, w = config.patch
  latents = rearrange(latents, "b n (c hw) -> b n c 1 hw", hw=h * w)
  latents = jnp.pad(latents, ((0, 0), (0, 0), (0, 0), (0, t - 1), (0, 0)))
  return rearrange(latents, "b n c t hw -> b n (c t hw)")
