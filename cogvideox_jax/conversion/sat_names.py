"""Where SAT (THUDM/CogVideo, folder sat/) keeps each tensor that diffusers has.

SAT stores queries, keys and values in one tensor, and the two modulations of a block in another;
its VAE counts the decoder's levels from the finest. Every other tensor has just another name. So a
`Source` says which SAT tensor holds a tensor of diffusers, and which slices of its first axis.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from cogvideox_jax.errors import UserError

PREFIX = "model.diffusion_model."  # Begins the names of the transformer, not those of the VAE.

# Tensors that these models do not use or compute anew: other networks that a file may hold,
# position tables, unused embeddings, the discriminator.
NOT_OURS = re.compile(
  r"(conditioner|first_stage_model|loss)\..*"
  r"|.*\.(freqs_sin|freqs_cos)"
  r"|.*transformer\.(word_embeddings|position_embeddings|embed_tokens|position_embedding)\..*"
)


class Source(NamedTuple):
  """A SAT tensor, and the slices of its first axis that, joined in order, are diffusers' tensor."""

  name: str
  slices: tuple[tuple[int, int], ...] = ((0, 1),)  # Start and stop, in units of 1 / units.
  units: int = 1  # Equal pieces of the first axis.

  @property
  def is_whole(self) -> bool:
    """Whether diffusers' tensor is the SAT tensor itself."""
    return self.units == 1

  @property
  def taken(self) -> int:
    """The number of units in the slices."""
    return sum(stop - start for start, stop in self.slices)


_JOINED = "transformer.layers.{i}.attention.query_key_value"
_MODULATIONS = "mixins.adaln_layer.adaLN_modulations.{i}.1"
# Modules of diffusers outside the blocks -> SAT's.
MODULES = {
  "patch_embed.proj": "mixins.patch_embed.proj",
  "patch_embed.text_proj": "mixins.patch_embed.text_proj",
  "patch_embed.pos_embedding": "mixins.pos_embed.pos_embedding",
  "time_embedding.linear_1": "time_embed.0",
  "time_embedding.linear_2": "time_embed.2",
  "ofs_embedding.linear_1": "ofs_embed.0",
  "ofs_embedding.linear_2": "ofs_embed.2",
  # The names of the last two norms are crossed, and their shapes are the same.
  "norm_final": "transformer.final_layernorm",
  "norm_out.norm": "mixins.final_layer.norm_final",
  "norm_out.linear": "mixins.final_layer.adaLN_modulation.1",
  "proj_out": "mixins.final_layer.linear",
}
# Modules of diffusers in block i -> SAT's.
BLOCK_MODULES = {
  "norm1.norm": Source("transformer.layers.{i}.input_layernorm"),
  "norm2.norm": Source("transformer.layers.{i}.post_attention_layernorm"),
  # Twelve: (shift, scale, gate) of attention and MLP for vision, then the same for text.
  "norm1.linear": Source(_MODULATIONS, ((0, 3), (6, 9)), 12),
  "norm2.linear": Source(_MODULATIONS, ((3, 6), (9, 12)), 12),
  "attn1.to_q": Source(_JOINED, ((0, 1),), 3),
  "attn1.to_k": Source(_JOINED, ((1, 2),), 3),
  "attn1.to_v": Source(_JOINED, ((2, 3),), 3),
  "attn1.to_out.0": Source("transformer.layers.{i}.attention.dense"),
  "attn1.norm_q": Source("mixins.adaln_layer.query_layernorm_list.{i}"),
  "attn1.norm_k": Source("mixins.adaln_layer.key_layernorm_list.{i}"),
  "ff.net.0.proj": Source("transformer.layers.{i}.mlp.dense_h_to_4h"),
  "ff.net.2": Source("transformer.layers.{i}.mlp.dense_4h_to_h"),
}


def transformer_source(name: str) -> Source:
  """Where SAT keeps a tensor of the transformer, without PREFIX.

  Raises:
    KeyError: SAT does not have it.
  """
  module, ending = _split(name)
  block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
  if block is None:
    return Source(MODULES[module] + ending)
  source = BLOCK_MODULES[block[2]]
  return source._replace(name=source.name.format(i=block[1]) + ending)


def vae_source(name: str, levels: int) -> Source:
  """Where SAT keeps a tensor of a VAE.

  levels: the number of resolutions of the VAE.
  """
  renamed = re.sub(r"^(\w+)\.down_blocks\.(\d+)\.", r"\1.down.\2.", name)
  renamed = re.sub(
    r"^(\w+)\.up_blocks\.(\d+)\.", lambda m: f"{m[1]}.up.{levels - 1 - int(m[2])}.", renamed
  )
  renamed = re.sub(
    r"\.mid_block\.resnets\.(\d+)\.", lambda m: f".mid.block_{int(m[1]) + 1}.", renamed
  )
  renamed = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", renamed)
  renamed = renamed.replace(".resnets.", ".block.").replace("conv_shortcut", "nin_shortcut")
  return Source(renamed)


def _split(name: str) -> tuple[str, str]:
  """The module, and its ending `.weight` or `.bias`, or none."""
  match = re.fullmatch(r"(.+?)(\.weight|\.bias)?", name)
  assert match is not None  # The pattern matches every name.
  return match[1], match[2] or ""


# (SAT's module, index of the matrix in it) -> module of diffusers.
_LORA_MODULES = {
  ("query_key_value", "0"): "to_q",
  ("query_key_value", "1"): "to_k",
  ("query_key_value", "2"): "to_v",
  ("dense", "0"): "to_out.0",
}
_LORA = re.compile(
  r".*transformer\.layers\.(?P<layer>\d+)\.attention\.(?P<module>query_key_value|dense)"
  r"\.matrix_(?P<matrix>[AB])\.(?P<index>\d)"
)


def lora_names(found: Iterable[str]) -> dict[str, str]:
  """diffusers' name (`transformer_blocks...`) -> SAT's, of the LoRA tensors among SAT's names."""
  result = {}
  for name in found:
    if (match := _LORA.fullmatch(name)) and (match["module"], match["index"]) in _LORA_MODULES:
      module = _LORA_MODULES[match["module"], match["index"]]
      block = f"transformer_blocks.{match['layer']}.attn1"
      result[f"{block}.{module}.lora_{match['matrix']}.weight"] = name
  return result


def lora_name(name: str) -> str:
  """SAT's name of a LoRA tensor of diffusers (`transformer_blocks...`).

  Raises:
    UserError: SAT's LoRA does not change this module.
  """
  match = re.fullmatch(r"transformer_blocks\.(\d+)\.attn1\.(.+)\.lora_([AB])\.weight", name)
  of_module = {module: key for key, module in _LORA_MODULES.items()}
  if match is None or match[2] not in of_module:
    raise UserError(f"SAT's LoRA has no place for {name}; it changes {', '.join(of_module)}.")
  module, index = of_module[match[2]]
  return f"{PREFIX}transformer.layers.{match[1]}.attention.{module}.matrix_{match[3]}.{index}"
