"""Derives the config of a SAT checkpoint, which does not store it, from the shapes of its tensors.

What shapes do not determine is as in the published models: SAT's yaml files and the presets of
diffusers' converter (`convert_cogvideox_to_diffusers.py`).
"""

import re

from cogvideox_jax.conversion.sat_names import PREFIX
from cogvideox_jax.conversion.tensors import Tensors
from cogvideox_jax.diffusion.noise import NoiseConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.vae_config import VAEConfig

TEXT_LENGTH = 226
SIZES = {1: (49, 60, 90), 2: (81, 300, 300)}  # Frames of a patch -> sample frames, height, width.
SCALING_2B, SCALING = 1.15258426, 0.7


def transformer(stored: Tensors) -> DiTConfig:
  """The config of a transformer, a published one or one of other sizes.

  Raises:
    UserError: a tensor is missing that every transformer of SAT's has.
  """

  def shape(name: str) -> tuple[int, ...]:
    if PREFIX + name not in stored:
      raise UserError(f"This is no transformer of SAT's: {PREFIX}{name} is missing.")
    return stored.spec(PREFIX + name).shape

  patch = shape("mixins.patch_embed.proj.weight")
  frames = 1 if len(patch) == 4 else 2  # A 2-D convolution of each frame, or a linear layer.
  height = patch[2] if frames == 1 else 2
  area = frames * height * height
  in_channels = patch[1] if frames == 1 else patch[1] // area
  out_channels = shape("mixins.final_layer.linear.weight")[0] // area
  head_dim = shape("mixins.adaln_layer.query_layernorm_list.0.weight")[0]
  layers = re.compile(re.escape(PREFIX) + r"transformer\.layers\.(\d+)\.input_layernorm\.weight")
  ofs = f"{PREFIX}ofs_embed.0.weight"
  sees_image = in_channels != out_channels
  sample_frames, sample_height, sample_width = SIZES[frames]
  return DiTConfig(
    depth=sum(1 for name in stored if layers.fullmatch(name)),
    heads=patch[0] // head_dim,
    head_dim=head_dim,
    time_width=shape("time_embed.0.weight")[0],
    in_channels=in_channels,
    out_channels=out_channels,
    patch=(frames, height, height),
    text_width=shape("mixins.patch_embed.text_proj.weight")[1],
    text_length=TEXT_LENGTH,
    positions=_positions(stored, frames, sees_image),
    sample_frames=sample_frames,
    sample_height=sample_height,
    sample_width=sample_width,
    spatial_interpolation=1.875,
    temporal_interpolation=1.0,
    learned_positions=sees_image and frames == 1,
    ofs_width=stored.spec(ofs).shape[1] if ofs in stored else 0,
  )


def _positions(stored: Tensors, frames: int, sees_image: bool) -> str:
  """The position rule. SAT's file holds its rotary tables; 2B has none, and uses sincos."""
  if frames > 1:
    return "rope_index"
  rotates = sees_image or any(name.endswith("pos_embed.freqs_cos") for name in stored)
  return "rope" if rotates else "sincos"


def vae(config: DiTConfig) -> VAEConfig:
  """The config of the one published VAE, with the latent scale of a transformer."""
  return VAEConfig(
    scaling_factor=SCALING_2B if config.positions == "sincos" else SCALING,
    invert_scale_latents=config.patch[0] > 1,
  )


def noise(config: DiTConfig) -> NoiseConfig:
  """The noise schedule of a transformer."""
  return NoiseConfig(
    steps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    snr_shift=3.0 if config.positions == "sincos" else 1.0,
    zero_terminal_snr=True,
  )
