"""Configs of small models that are written and read, and weights for them."""

import jax
import numpy as np
from etils import epath
from flax import nnx

from cogvideox_jax.conversion import tensors
from cogvideox_jax.diffusion.noise import NoiseConfig
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.t5 import T5Config
from cogvideox_jax.models.vae_config import VAEConfig

TOKENIZER = epath.resource_path("cogvideox_jax") / "assets" / "tiny" / "tokenizer"


DIT = DiTConfig(
  depth=2,
  heads=2,
  head_dim=16,
  time_width=20,
  in_channels=4,
  out_channels=4,
  patch=(1, 2, 2),
  text_width=24,
  text_length=10,
  positions="rope_index",
  sample_frames=9,
  sample_height=6,
  sample_width=10,
  spatial_interpolation=1.875,
  temporal_interpolation=1.0,
)


AUTOENCODER = VAEConfig(
  channels=(4, 4, 8, 8), latent_channels=4, resnets=1, groups=2, scaling_factor=0.9
)


TEXT = T5Config(vocab=32100, width=24, head_dim=4, heads=3, mlp_width=40, depth=2)


NOISE = NoiseConfig(
  steps=1000, beta_start=0.00085, beta_end=0.012, snr_shift=1.0, zero_terminal_snr=True
)


def drawn(model: type[nnx.Module], config, seed: int):
  """Weights drawn without zeros and ones, since those hide mistakes."""
  rng = np.random.default_rng(seed)
  shapes = tensors.abstract_params(model, config)
  return jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.2).astype(np.float32), shapes)
