"""Models of a few thousand drawn weights, for tests of what is built from models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from cogvideox_jax.conversion.folder import Settings
from cogvideox_jax.conversion.tensors import abstract_params
from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.diffusion import objective
from cogvideox_jax.diffusion.noise import NoiseConfig
from cogvideox_jax.inference.pipeline import Pipeline
from cogvideox_jax.inference.progress import Progress
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.t5 import T5Config, T5Encoder
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.models.vae_config import VAEConfig

DIT_CONFIG = DiTConfig(
  depth=2,
  heads=2,
  head_dim=16,
  time_width=16,
  in_channels=4,
  out_channels=4,
  patch=(1, 2, 2),
  text_width=8,
  text_length=6,
  positions="rope_index",
  sample_frames=9,
  sample_height=4,
  sample_width=6,
  spatial_interpolation=1.875,
  temporal_interpolation=1.0,
)
VAE_CONFIG = VAEConfig(channels=(8, 8, 8), latent_channels=4, resnets=1, groups=2)
T5_CONFIG = T5Config(width=8, head_dim=4, heads=2, mlp_width=8, depth=1)
ZEROS = Settings(text_drop="zeros")
NOISE = NoiseConfig(1000, 0.00085, 0.012, snr_shift=1.0, zero_terminal_snr=True)


def draw(model, config, seed=0):
  """Config and weights, none of them zero, since zeros hide mistakes."""
  rng = np.random.default_rng(seed)

  def leaf(path, shape):
    centre = 1.0 if path[-1].key == "scale" else 0.0
    return rng.normal(centre, 0.2, shape.shape).astype(np.float32)

  return config, jax.tree_util.tree_map_with_path(leaf, abstract_params(model, config))


def make_pipeline(
  transformer=None,
  settings=ZEROS,
  kind=Pipeline,
  vae_config=VAE_CONFIG,
  devices=None,
  offload=False,
  **changes,
):
  """A silent pipeline, of a given transformer or of one drawn with changes of its config."""
  return kind(
    transformer or draw(DiT, dataclasses.replace(DIT_CONFIG, **changes)),
    draw(VAE, vae_config),
    draw(T5Encoder, T5_CONFIG),
    Tokenizer(epath.resource_path("cogvideox_jax") / "assets" / "tiny" / "tokenizer"),
    NOISE,
    settings,
    progress=Progress(show=False),
    devices=devices,
    offload=offload,
  )


def v_loss(denoise, latents, timesteps, batch, schedule, weighting="tokens"):
  """The loss of a whole batch, on latents that are given rather than drawn."""
  timed = objective.TimedBatch(batch, timesteps, jnp.arange(len(batch.segment_ids)))
  total = objective.squared_error(denoise, latents, timed, schedule, weighting)
  return total / objective.counted(batch, weighting)
