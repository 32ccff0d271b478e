"""The terms of the VAE's loss (CogVideoX, arXiv:2408.06072, section 2.1).

L1, a perceptual distance (LPIPS), the divergence of the latents from the unit normal, and, once the
reconstructions are good, an adversarial term (hinge loss). The paper names the terms but not their
weights, and the authors' released fragment cannot run; what is not named there is ours. Every term
is a mean over the clips of a batch, so that any mesh and any number of microbatches give the same
numbers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from cogvideox_jax.sharded_vae import SharedClips
from cogvideox_jax.types import Params

Metrics = dict[str, Float[Array, ""]]
Judge = Callable[[Float[Array, "b F H W 3"]], Float[Array, "b f h w"]]  # Gives logits.
SMALLEST_ERROR = 1e-10  # A bound, so that the PSNR of an exact reconstruction is a number, 106 dB.
NOISE_FOLD, FRAME_FOLD, WINDOW_FOLD = range(3)  # Part what the key of a clip draws.


class LossWeights(NamedTuple):
  """The weights of the terms; means over pixels in [-1, 1], over frames or over latents."""

  l1: float
  l2: float
  kl: float
  perceptual: float = 0.0


class Perceptual(NamedTuple):
  """A perceptual distance, and how much of a clip it looks at."""

  # (parameters, pictures, pictures) -> distances, for pictures [b, f, H, W, 3] in [-1, 1].
  distance: Callable[[Params, Array, Array], Float[Array, "b f"]]
  frames: int  # Frames drawn of each clip; 0: all of them.


def reconstruction_loss(
  clips: SharedClips,
  restored: Float[Array, "b S H W 3"],
  frames: Float[Array, "b S H W 3"],
  keys: Key[Array, " b"],
  weights: LossWeights,
  perceptual: Perceptual | None,
  network: Params,
) -> tuple[Float[Array, ""], Metrics]:
  """Returns what the loss says of the pixels.

  Args:
    clips: how devices share the clips.
    restored, frames: in [-1, 1], as `clips` spreads them.
    keys: one a clip; they draw the frames that the perceptual distance looks at.
    perceptual: None leaves that term out.
    network: the parameters of the perceptual distance.

  Returns:
    The weighted sum; `l1`, `mse` and, with a perceptual distance, `lpips`.
  """
  difference = restored - frames
  metrics = {
    "l1": clips.mean(jnp.abs(difference)),
    "mse": clips.mean(jnp.square(difference)),
  }
  loss = weights.l1 * metrics["l1"] + weights.l2 * metrics["mse"]
  if perceptual:
    metrics["lpips"] = _perceptual_loss(clips, restored, frames, keys, perceptual, network)
    loss += weights.perceptual * metrics["lpips"]
  return loss, metrics


def _perceptual_loss(
  clips: SharedClips,
  restored: Float[Array, "b S H W 3"],
  frames: Float[Array, "b S H W 3"],
  keys: Key[Array, " b"],
  perceptual: Perceptual,
  network: Params,
) -> Float[Array, ""]:
  """Returns the mean distance over the frames, or over those that are drawn."""
  if not 0 < perceptual.frames < clips.encoding.frames:
    return clips.mean(clips.map(perceptual.distance, network, restored, frames))
  seen = [drawn_frames(clips.whole(x), keys, perceptual.frames) for x in (restored, frames)]
  return perceptual.distance(network, *seen).mean()


def divergence(
  clips: SharedClips, mean: Float[Array, "b s h w c"], logvar: Float[Array, "b s h w c"]
) -> Float[Array, ""]:
  """Returns the divergence of the latents' distribution from the unit normal, a mean over them.

  The authors' code sums over the latents of a clip, so that its weight depends on the clip's size.
  """
  return clips.mean_of_latents(0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar))


def psnr(mse: Float[Array, ""]) -> Float[Array, ""]:
  """Returns the peak signal-to-noise ratio in dB of a mean squared error of [-1, 1]."""
  return 10 * jnp.log10(4 / jnp.maximum(mse, SMALLEST_ERROR))  # The range of [-1, 1] is 2.


def generator_loss(judge: Judge, restored: Float[Array, "b F H W 3"]) -> Float[Array, ""]:
  """Returns the adversarial term: low where the discriminator takes reconstructions for real."""
  return -judge(restored).mean()


def discriminator_loss(
  judge: Judge, frames: Float[Array, "b F H W 3"], restored: Float[Array, "b F H W 3"], r1: float
) -> tuple[Float[Array, ""], Metrics]:
  """Returns the hinge loss of the discriminator, and its penalty if r1 is not 0.

  Args:
    r1: weight of the squared norm of the gradient, with respect to the pixels of a real clip, of
      the clip's mean logit (arXiv:1801.04406); half of it is counted, as there.

  Returns:
    The loss; `logits_real` and `logits_fake`, the means, and `r1` before it is weighted.
  """
  real, fake = judge(frames), judge(restored)
  loss = 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())
  metrics = {"logits_real": real.mean(), "logits_fake": fake.mean()}
  if r1:
    gradient = jax.grad(lambda x: judge(x).mean(axis=(1, 2, 3)).sum())(frames)
    metrics["r1"] = jnp.square(gradient).sum(axis=(1, 2, 3, 4)).mean()
    loss += r1 / 2 * metrics["r1"]
  return loss, metrics


def drawn_frames(
  clips: Float[Array, "b F H W 3"], keys: Key[Array, " b"], count: int
) -> Float[Array, "b f H W 3"]:
  """Returns `count` frames of each clip, drawn without repetition; 0, or too many: all."""
  if not 0 < count < clips.shape[1]:
    return clips

  def draw(clip: Array, key: Key[Array, ""]) -> Array:
    chosen = jax.random.permutation(jax.random.fold_in(key, FRAME_FOLD), clips.shape[1])[:count]
    return jnp.take(clip, chosen, axis=0)

  return jax.vmap(draw)(clips, keys)


def drawn_window(
  clips: Float[Array, "b F H W 3"], keys: Key[Array, " b"], count: int
) -> Float[Array, "b f H W 3"]:
  """Returns `count` successive frames of each clip from a drawn one on; 0, or too many: all."""
  if not 0 < count < clips.shape[1]:
    return clips

  def draw(clip: Array, key: Key[Array, ""]) -> Array:
    most = clips.shape[1] - count
    first = jax.random.randint(jax.random.fold_in(key, WINDOW_FOLD), (), 0, most + 1)
    return jax.lax.dynamic_slice_in_dim(clip, first, count)

  return jax.vmap(draw)(clips, keys)


def posterior_noise(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b f h w c"]:
  """Returns standard normal noise, of which each clip's key draws its own.

  Args:
    shape: of the noise of a clip.
  """

  def draw(key: Key[Array, ""]) -> Array:
    return jax.random.normal(jax.random.fold_in(key, NOISE_FOLD), shape)

  return jax.vmap(draw)(keys)
