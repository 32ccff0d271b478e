"""Weights under the names of SAT (THUDM/CogVideo, folder sat/).

The names are written down here from SAT's files and diffusers' converter, not taken from the
package: the package's own table is what they test.
"""

import re

import torch
from torch import Tensor

from .folder import GoldensFolder
from .models import make_pipeline_vae, make_transformer

PREFIX = "model.diffusion_model."  # The transformer's tensors have it, the VAE's do not.
OUTSIDE_BLOCKS = {  # diffusers' module -> SAT's.
  "patch_embed.proj": "mixins.patch_embed.proj",
  "patch_embed.text_proj": "mixins.patch_embed.text_proj",
  "time_embedding.linear_1": "time_embed.0",
  "time_embedding.linear_2": "time_embed.2",
  "ofs_embedding.linear_1": "ofs_embed.0",
  "ofs_embedding.linear_2": "ofs_embed.2",
  "norm_final": "transformer.final_layernorm",
  "norm_out.norm": "mixins.final_layer.norm_final",
  "norm_out.linear": "mixins.final_layer.adaLN_modulation.1",
  "proj_out": "mixins.final_layer.linear",
}
IN_BLOCKS = {
  "attn1.to_out.0": "transformer.layers.{}.attention.dense",
  "norm1.norm": "transformer.layers.{}.input_layernorm",
  "norm2.norm": "transformer.layers.{}.post_attention_layernorm",
  "ff.net.0.proj": "transformer.layers.{}.mlp.dense_h_to_4h",
  "ff.net.2": "transformer.layers.{}.mlp.dense_4h_to_h",
  "attn1.norm_q": "mixins.adaln_layer.query_layernorm_list.{}",
  "attn1.norm_k": "mixins.adaln_layer.key_layernorm_list.{}",
}


def make(folder: GoldensFolder) -> None:
  """Two transformers, which together have every tensor that SAT names, and a VAE."""
  for kind in ("5b_i2v", "15_i2v"):
    weights = make_transformer(kind, folder.sizes, folder.draws).state_dict()
    found = transformer_tensors(weights, folder.sizes.layers)
    folder.add_sat(f"transformer_{kind}", f"transformer_{kind}", found)
  weights = make_pipeline_vae(folder.sizes, folder.draws).state_dict()
  folder.add_sat("vae", "pvae", {vae_name(name): x for name, x in weights.items()})


def transformer_tensors(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
  found = {}
  if "patch_embed.pos_embedding" in weights:
    found["mixins.pos_embed.pos_embedding"] = weights["patch_embed.pos_embedding"]
  for end in ("weight", "bias"):
    for theirs, name in OUTSIDE_BLOCKS.items():
      if f"{theirs}.{end}" in weights:
        found[f"{name}.{end}"] = weights[f"{theirs}.{end}"]
    for layer in range(layers):
      block = f"transformer_blocks.{layer}"
      for theirs, name in IN_BLOCKS.items():
        found[f"{name.format(layer)}.{end}"] = weights[f"{block}.{theirs}.{end}"]
      joined = torch.cat([weights[f"{block}.attn1.to_{x}.{end}"] for x in "qkv"])
      found[f"transformer.layers.{layer}.attention.query_key_value.{end}"] = joined
      # Both have (shift, scale, gate) of vision, then of text; SAT first all of vision.
      attention, mlp = (weights[f"{block}.{norm}.linear.{end}"] for norm in ("norm1", "norm2"))
      halves = [*attention.chunk(2), *mlp.chunk(2)]
      joined = torch.cat([halves[i] for i in (0, 2, 1, 3)])
      found[f"mixins.adaln_layer.adaLN_modulations.{layer}.1.{end}"] = joined
  return {PREFIX + name: x for name, x in found.items()}


def vae_name(name: str) -> str:
  """SAT counts the decoder's levels from the finest of the four, and calls resnets blocks."""
  name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{3 - int(found[1])}", name)
  name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
  for theirs, sat in (
    ("down_blocks", "down"),
    ("resnets", "block"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("conv_shortcut", "nin_shortcut"),
  ):
    name = name.replace(theirs, sat)
  return name
