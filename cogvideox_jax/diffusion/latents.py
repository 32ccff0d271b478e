"""What the network is shown of a batch, but for the timesteps: drawn anew at every step.

Latents of the clips and of their images come from the VAE's posteriors. An image's stand beside
the noised latents in the first latent frame, zeros in all others, as in SAT's training of image
to video and in diffusers' sampling.
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
  """How stored posteriors become what the network sees."""

  patch: tuple[int, int, int]  # Latent frames, height, width.
  scaling_factor: float  # Of the VAE; brings latents to about unit variance.
  image_scale: float  # Of an image's latents, in its place; see VAEConfig.image_scale.
  image_drop_rate: float  # The share of clips whose image is replaced by zeros.


class Latents(NamedTuple):
  """One draw for a batch."""

  x0: Float[Array, "b n p"]  # Scaled.
  noise: Float[Array, "b n p"]  # Standard normal.
  image: Float[Array, "b n p"] | None  # Scaled; None for a model that sees none.


def draw_latents(
  batch: Batch,
  key: Key[Array, ""],
  config: LatentConfig,
  rows: Int[Array, "b"] | None = None,
) -> Latents:
  """Draws from the posteriors, draws noise, and drops images, each clip's by itself.

  rows: their numbers in the global batch, which decide what is drawn for them, so that it does not
  depend on how the batch is cut; by default the batch is the whole.
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
  spread = jnp.exp(jnp.clip(logvar, -30, 20) / 2)  # Clipped as the published VAE does.
  return mean + spread * _normal(keys, mean.shape)


def _in_first_patch(batch: Batch) -> Bool[Array, "b n"]:
  """Vision tokens of the first patch in time."""
  is_vision = (batch.experts == VISION) & (batch.segment_ids > 0)
  return jnp.asarray(is_vision & (batch.coordinates[..., 0] == 0))


def _repeat_first_frame(
  x0: Float[Array, "b n p"],
  extra: Int[Array, "b s"],
  batch: Batch,
  patch: tuple[int, int, int],
) -> Float[Array, "b n p"]:
  """Makes the extra latent frames in front what the first one is, which is drawn once.

  As CogVideoX 1.5 was trained, where a latent that is drawn already is repeated. They all stand in
  a clip's first patch, being fewer than it spans.
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
  """Latents of each clip's image in its first latent frame; zeros elsewhere, and if dropped."""
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
