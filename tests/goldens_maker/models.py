"""The small models: their sizes, configs and random weights."""

import math
import re
import types
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from .draws import Draws

KINDS = ("2b", "5b", "5b_i2v", "15", "15_i2v")  # Transformers; 15 is CogVideoX 1.5.


@dataclass(frozen=True)
class Sizes:
  """What the flags set; the defaults are those of tests/data/goldens."""

  seed: int = 0
  debug: int = 0  # 1 adds activations (dbg.*), to find where a difference begins.
  heads: int = 2  # heads * head_dim is a multiple of 16.
  head_dim: int = 16  # A multiple of 16: rotations take 1/4, 3/8 and 3/8 of it, each even.
  layers: int = 2
  time_dim: int = 20
  text_dim: int = 24
  text_len: int = 10  # Tokens.
  lat_ch: int = 4
  lat_f: int = 3  # Latents of the transformers' default clips: frames, height, width.
  lat_h: int = 4
  lat_w: int = 6
  alt_f: int = 2  # Latents of clips of another size.
  alt_h: int = 8
  alt_w: int = 10
  max15: int = 20  # Sample height and width of the transformers of 1.5, in latents.
  vae_ch: str = "4,8,8,8"  # Channels of each level.
  vae_groups: int = 2
  vae_layers: int = 1
  vae_lat: int = 4
  vae_h: int = 16  # Videos of the VAE, in pixels.
  vae_w: int = 24
  tile_h: int = 48  # A tile of the VAE, in pixels.
  tile_w: int = 40
  tiled_h: int = 56  # A video that is tiled.
  tiled_w: int = 48

  @property
  def frames(self) -> int:
    """Pixel frames of a default clip."""
    return 4 * (self.lat_f - 1) + 1


# The std of a kernel's entries, times the root of its fan-in, by the first pattern that its name
# contains. Small gains make variances so small that a wrong epsilon of a norm shows; those of
# modulations keep the layers far from the identity.
GAINS = (
  (r"\.to_[qk]\.|patch_embed\.", 0.03),
  (r"\.ff\.net\.", 2.0),
  (r"norm1\.linear|norm2\.linear|norm_out\.linear", 0.8),
  (r"time_embedding|ofs_embedding", 1.3),
  (r"\.conv_[yb]\.", 0.7),
  (r"conv_out|proj_out", 1.0),
  (r"\.conv[12]\.|conv_in", 0.15),
  (r"", 0.9),
)
T5_GAINS = ((r"\.[qk]\.weight$", 0.35), (r"", 0.9))


def gain(name: str, gains: tuple[tuple[str, float], ...]) -> float:
  return next(value for pattern, value in gains if re.search(pattern, name))


def draw_weights(model: nn.Module, draws: Draws, prefix: str) -> None:
  """Draws every parameter of a diffusers model, and the position table that one learns."""
  for name, x in model.float().state_dict().items():  # The table is made in float64.
    if name.endswith("pos_embedding"):
      mean, std = 0.0, 0.3
    elif x.ndim == 1 and name.endswith("weight"):  # The scale of a norm.
      mean, std = 1.0, 0.25
    elif x.ndim == 1:
      mean = 1.0 if name.endswith("conv_y.conv.bias") else 0.0  # It scales, too.
      std = 0.3 if re.search("norm|conv_y|conv_b", name) else 0.03
    else:
      mean, std = 0.0, gain(name, GAINS) / math.sqrt(x[0].numel())
    x.copy_(mean + draws.normal(f"{prefix}/{name}", *x.shape, std=std))


def transformer_config(kind: str, sizes: Sizes) -> dict[str, Any]:
  """The arguments of a `CogVideoXTransformer3DModel`; kind: one of KINDS."""
  is_15, sees_image = kind.startswith("15"), kind.endswith("i2v")
  return {
    "num_attention_heads": sizes.heads,
    "attention_head_dim": sizes.head_dim,
    "num_layers": sizes.layers,
    "in_channels": sizes.lat_ch * (2 if sees_image else 1),
    "out_channels": sizes.lat_ch,
    "time_embed_dim": sizes.time_dim,
    "ofs_embed_dim": sizes.time_dim if kind == "15_i2v" else None,
    "text_embed_dim": sizes.text_dim,
    "max_text_seq_length": sizes.text_len,
    "sample_frames": sizes.frames,
    "sample_height": sizes.max15 if is_15 else sizes.lat_h,
    "sample_width": sizes.max15 if is_15 else sizes.lat_w,
    "patch_size": 2,
    "patch_size_t": 2 if is_15 else None,
    "patch_bias": not is_15,
    "use_rotary_positional_embeddings": kind != "2b",
    "use_learned_positional_embeddings": kind == "5b_i2v",
  }


def make_transformer(kind: str, sizes: Sizes, draws: Draws) -> CogVideoXTransformer3DModel:
  model = CogVideoXTransformer3DModel(**transformer_config(kind, sizes))
  draw_weights(model, draws, f"transformer_{kind}")
  return model.eval()


def make_vae(sizes: Sizes, draws: Draws) -> AutoencoderKLCogVideoX:
  """The VAE of the cases that run it alone."""
  channels = tuple(map(int, sizes.vae_ch.split(",")))
  return _vae(
    sizes,
    draws,
    "vae",
    block_out_channels=channels,
    latent_channels=sizes.vae_lat,
    layers_per_block=sizes.vae_layers,
    norm_num_groups=sizes.vae_groups,
    scaling_factor=0.7,
    invert_scale_latents=False,
  )


def make_pipeline_vae(
  sizes: Sizes, draws: Draws, scaling: float = 0.7, invert: bool = False
) -> AutoencoderKLCogVideoX:
  """A smaller one, with the latent channels of the transformers, for pipelines."""
  return _vae(
    sizes,
    draws,
    "pvae",
    block_out_channels=(4, 4, 4, 8),
    latent_channels=sizes.lat_ch,
    layers_per_block=1,
    norm_num_groups=2,
    scaling_factor=scaling,
    invert_scale_latents=invert,
  )


def _vae(sizes: Sizes, draws: Draws, name: str, **config: Any) -> AutoencoderKLCogVideoX:
  # diffusers' tiles are half the sample size.
  model = AutoencoderKLCogVideoX(
    sample_height=2 * sizes.tile_h, sample_width=2 * sizes.tile_w, **config
  )
  draw_weights(model, draws, name)
  return model.eval()


def make_text_encoder(sizes: Sizes, draws: Draws) -> T5EncoderModel:
  config = T5Config(
    vocab_size=96,
    d_model=sizes.text_dim,
    d_kv=8,
    num_heads=3,
    d_ff=40,
    num_layers=3,
    num_decoder_layers=3,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
  )
  model = T5EncoderModel(config).eval()
  for name, x in model.state_dict().items():
    if name == "encoder.embed_tokens.weight":  # Another name of shared.weight.
      continue
    mean = 1.0 if "layer_norm" in name else 0.0
    if "layer_norm" in name:
      std = 0.3
    elif "relative_attention_bias" in name:
      std = 1.0
    elif name == "shared.weight":
      std = 0.01  # So small that a wrong epsilon of the norm shows.
    else:
      std = gain(name, T5_GAINS) / math.sqrt(x.shape[1])
    x.copy_(mean + draws.normal(f"t5/{name}", *x.shape, std=std))
  return model


def token_ids(draws: Draws, name: str, length: int, ends: list[int]) -> Tensor:
  """Ids of prompts [len(ends), length], each with </s> as its last token and padding after it."""
  ids = draws.integers(name, 2, 96, len(ends), length)
  for row, end in zip(ids, ends, strict=True):
    row[end - 1], row[end:] = 1, 0
  return ids


def empty_prompt(length: int) -> Tensor:
  return torch.tensor([[1] + [0] * (length - 1)])


def rotary_tables(config: Any, latents: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
  """Cosines and sines [tokens, head_dim] that diffusers' pipeline makes for (f, h, w) latents.

  config: the transformer's, or its fields that the pipeline reads.
  """
  frames, height, width = latents
  pipeline = types.SimpleNamespace(
    vae_scale_factor_spatial=8, transformer=types.SimpleNamespace(config=config)
  )
  return CogVideoXPipeline._prepare_rotary_positional_embeddings(
    pipeline, height * 8, width * 8, frames, torch.device("cpu")
  )
