"""The config of a SAT checkpoint, which does not say it: read off the shapes of its tensors.

What shapes do not tell is as in the published models: SAT's yaml files and the presets of
diffusers' converter (`convert_cogvideox_to_diffusers.py`).
"""

import re

from cogvideox_jax.conversion.sat import PREFIX
from cogvideox_jax.conversion.tensors import Tensors
from cogvideox_jax.diffusion.noise import NoiseConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.vae_config import VAEConfig

TEXT_LENGTH = 226
SIZES = {1: (49, 60, 90), 2: (81, 300, 300)}  # Frames of a patch -> sample frames, height, width.
SCALING_2B, SCALING = 1.15258426, 0.7


def transformer(stored: Tensors) -> DiTConfig:
  """Of a published transformer, or one of other sizes.

  Raises:
    UserError: it lacks a tensor that every transformer of SAT's has.
  """

  def shape(name: str) -> tuple[int, ...]:
    if PREFIX + name not in stored:
      raise UserError(f"This is no transformer of SAT's: {PREFIX}{name} is missing.")
    return stored.spec(PREFIX + name).shape

  patch = shape("mixins.patch_embed.proj.weight")
  frames = 1 if len(patch) == 4 else 2  # A convolution of each frame, or a linear layer of two.
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
  """SAT keeps the tables of its rotations in the file; 2B, which has none, rotates nothing."""
  if frames > 1:
    return "rope_index"
  rotates = sees_image or any(name.endswith("pos_embed.freqs_cos") for name in stored)
  return "rope" if rotates else "sincos"


def vae(config: DiTConfig) -> VAEConfig:
  """That of the published VAE, which is one, with the scale that goes with a transformer."""
  return VAEConfig(
    scaling_factor=SCALING_2B if config.positions == "sincos" else SCALING,
    invert_scale_latents=config.patch[0] > 1,
  )


def noise(config: DiTConfig) -> NoiseConfig:
  """The schedule that goes with a transformer."""
  return NoiseConfig(
    steps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    snr_shift=3.0 if config.positions == "sincos" else 1.0,
    zero_terminal_snr=True,
  )
