"""Trains the VAE to reconstruct clips through the chunks that it is used with.

The loss is L1 plus the divergence of the latents from the unit normal (paper 2.1; its perceptual
and adversarial terms are not here yet).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from cogvideox_jax.data import buckets, manifest, video
from cogvideox_jax.data.buckets import Bucket
from cogvideox_jax.errors import UserError
from cogvideox_jax.models import vae
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.training.state import Params, TrainState

Metrics = dict[str, Float[Array, ""]]


def to_float(frames: UInt8[Array, "b F H W 3"]) -> Float[Array, "b F H W 3"]:
  """Bytes to [-1, 1]."""
  return jnp.float32(frames) / 127.5 - 1


def sample_posterior(
  mean: Float[Array, "b f h w c"], logvar: Float[Array, "b f h w c"], key: Key[Array, ""]
) -> Float[Array, "b f h w c"]:
  return mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape, mean.dtype)


def vae_loss(
  model: VAE, frames: Float[Array, "b F H W 3"], key: Key[Array, ""], kl_weight: float
) -> tuple[Float[Array, ""], Metrics]:
  """Reconstruction from a sample of the posterior, and its divergence; both are means."""
  mean, logvar = vae.encode(model, frames)
  restored = vae.decode(model, sample_posterior(mean, logvar, key))
  l1 = jnp.abs(restored - frames).mean()
  kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
  mse = jnp.square(restored - frames).mean()
  psnr = 10 * jnp.log10(4 / mse)  # The range of [-1, 1] is 2.
  loss = l1 + kl_weight * kl
  return loss, {"loss": loss, "l1": l1, "kl": kl, "psnr": psnr}


def vae_step(
  state: TrainState,
  frames: UInt8[Array, "b F H W 3"],
  key: Key[Array, ""],
  *,
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation,
  kl_weight: float,
  ema_decay: float,
) -> tuple[TrainState, Metrics]:
  """Reconstructs one batch and moves the weights. Pure, as training.step.train_step."""
  key = jax.random.fold_in(key, state.step)

  def loss_fn(params: Params) -> tuple[Float[Array, ""], Metrics]:
    return vae_loss(nnx.merge(graphdef, params), to_float(frames), key, kl_weight)

  grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = optax.incremental_update(params, state.ema, step_size=1 - ema_decay)
  metrics["grad_norm"] = optax.tree.norm(grads)
  return TrainState(state.step + 1, params, opt_state, ema), metrics


class Clips(NamedTuple):
  """Decoded clips by bucket, in memory; draws batches as a pure function of the step."""

  by_bucket: dict[Bucket, UInt8[np.ndarray, "clips F H W 3"]]

  def batch(self, size: int, seed: int, step: int) -> UInt8[np.ndarray, "b F H W 3"]:
    """Clips of one bucket; a bucket's chance is its number of clips."""
    rng = np.random.default_rng((seed, step))
    counts = np.array([len(clips) for clips in self.by_bucket.values()])
    clips = list(self.by_bucket.values())[rng.choice(len(counts), p=counts / counts.sum())]
    return clips[rng.integers(len(clips), size=size)]


def read_clips(path: str, config: ConfigDict) -> Clips:
  """Decodes every usable clip of a manifest or folder to its bucket.

  config: the `data` part: sizes, durations, fps.
  Raises UserError if no clip can be used.
  """
  items, refusals = manifest.read_manifest(path)
  found: dict[Bucket, list[np.ndarray]] = {}
  for item in tqdm(items, desc="Reading clips", unit="clip"):
    try:
      info = video.probe(item.file)
      bucket = buckets.assign(info, config.sizes, config.durations, config.fps)
      if bucket is None:
        continue
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


def measure_scaling_factor(model: VAE, clips: Clips, batch: int) -> float:
  """1 over the standard deviation of the latents (samples of the posterior) of all clips."""
  count = total = squares = 0.0
  for frames in clips.by_bucket.values():
    for start in range(0, len(frames), batch):
      mean, logvar = vae.encode(model, to_float(jnp.asarray(frames[start : start + batch])))
      count += mean.size
      total += float(mean.sum())
      squares += float((mean**2 + jnp.exp(logvar)).sum())
  return float((squares / count - (total / count) ** 2) ** -0.5)
