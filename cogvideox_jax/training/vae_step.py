"""Trains the VAE to reconstruct clips through the chunks that it is used with.

The loss is L1, L2 and the divergence of the latents from the unit normal (paper 2.1 and its first
version; the perceptual and adversarial terms are not here yet).
"""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8
from tqdm import tqdm

from cogvideox_jax.config.schema import VAEDataConfig
from cogvideox_jax.data import buckets, manifest, video
from cogvideox_jax.data.buckets import Bucket
from cogvideox_jax.errors import UserError
from cogvideox_jax.models import vae
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.training import optimizer
from cogvideox_jax.training.state import Params, TrainState

Metrics = dict[str, Float[Array, ""]]


class LossWeights(NamedTuple):
  """Of the means over pixels in [-1, 1] and over latents. Not published; ours."""

  l1: float
  l2: float
  kl: float


def to_float(frames: UInt8[Array, "b F H W 3"]) -> Float[Array, "b F H W 3"]:
  """Bytes to [-1, 1]."""
  return jnp.float32(frames) / 127.5 - 1


def vae_loss(
  model: VAE, frames: Float[Array, "b F H W 3"], key: Key[Array, ""], weights: LossWeights
) -> tuple[Float[Array, ""], Metrics]:
  """Reconstruction from a sample of the posterior, and its divergence; both are means."""
  mean, logvar = vae.encode(model, frames)
  noise = jax.random.normal(key, mean.shape, mean.dtype)
  restored = vae.decode(model, vae.sample_posterior(mean, logvar, noise))
  l1 = jnp.abs(restored - frames).mean()
  kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
  mse = jnp.square(restored - frames).mean()
  psnr = 10 * jnp.log10(4 / mse)  # The range of [-1, 1] is 2.
  loss = weights.l1 * l1 + weights.l2 * mse + weights.kl * kl
  return loss, {"loss": loss, "l1": l1, "kl": kl, "psnr": psnr}


def vae_step(
  state: TrainState,
  frames: UInt8[Array, "b F H W 3"],
  key: Key[Array, ""],
  *,
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation,
  weights: LossWeights,
  ema_decay: float,
) -> tuple[TrainState, Metrics]:
  """Reconstructs one batch and moves the weights. Pure, as training.step.train_step."""
  key = jax.random.fold_in(key, state.step)

  def loss_fn(params: Params) -> tuple[Float[Array, ""], Metrics]:
    return vae_loss(nnx.merge(graphdef, params), to_float(frames), key, weights)

  grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = cast(Params, optax.apply_updates(state.params, updates))
  ema = optimizer.average(state.ema, params, state.step, ema_decay)
  metrics["grad_norm"] = optax.tree.norm(grads)
  return TrainState(state.step + 1, params, opt_state, ema), metrics


class Clips(NamedTuple):
  """Decoded clips by bucket, in memory; draws batches as a pure function of the step."""

  by_bucket: dict[Bucket, UInt8[np.ndarray, "clips F H W 3"]]

  def batch(self, frames: int, seed: int, step: int) -> UInt8[np.ndarray, "b F H W 3"]:
    """Clips of one bucket, `frames` frames in all or the most below; buckets have equal chances."""
    rng = np.random.default_rng((seed, step))
    clips = list(self.by_bucket.values())[rng.integers(len(self.by_bucket))]
    return clips[rng.integers(len(clips), size=max(frames // clips.shape[1], 1))]


def read_clips(path: str, config: VAEDataConfig) -> Clips:
  """Decodes every usable clip of a manifest or folder to its bucket.

  Raises UserError if no clip can be used.
  """
  items, refusals = manifest.read_manifest(path)
  found: dict[Bucket, list[np.ndarray]] = {}
  for item in tqdm(items, desc="Reading clips", unit="clip"):
    try:
      info = video.probe(item.file)
      bucket = buckets.assign(info, config.sizes, config.durations, config.fps)
      frames = video.read(item.file, fps=config.fps, **bucket._asdict())
    except video.VideoError as error:
      tqdm.write(f"{item.file}: {error}")
      continue
    found.setdefault(bucket, []).append(frames)
  if not found:
    raise UserError(
      f"No clip of {path} can be used: {len(items)} named, {len(refusals)} refused.\n"
      f"The shortest duration is {min(config.durations)} frames at {config.fps} frames a second."
    )
  return Clips({bucket: np.stack(clips) for bucket, clips in sorted(found.items())})


def measure_scaling_factor(model: VAE, clips: Clips, batch_frames: int) -> float:
  """1 over the standard deviation of the latents (samples of the posterior) of the clips.

  Every clip counts but those of a bucket's last, incomplete batch.
  """
  count = total = squares = 0.0
  for frames in clips.by_bucket.values():
    size = min(max(batch_frames // frames.shape[1], 1), len(frames))
    for start in range(0, len(frames) - size + 1, size):
      mean, logvar = vae.encode(model, to_float(jnp.asarray(frames[start : start + size])))
      count += mean.size
      total += float(mean.sum())
      squares += float((mean**2 + jnp.exp(logvar)).sum())
  return float((squares / count - (total / count) ** 2) ** -0.5)
