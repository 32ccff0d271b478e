"""SAT's names and layouts (THUDM/CogVideo, folder sat/) for diffusers' tensors, and back.

SAT keeps queries, keys and values in one tensor, and the modulations of a block too; its VAE counts
the decoder's levels from the finest. Everything else is the same tensor under another name. So one
function says, for a tensor of diffusers', which tensor of SAT's holds it and which parts of that
one's first axis.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from cogvideox_jax.conversion import tensors, torch_files
from cogvideox_jax.conversion.components import AUTOENCODER, TRANSFORMER, Component
from cogvideox_jax.conversion.tensors import Params, Spec, Tensors, check_names
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.vae_config import VAEConfig

PREFIX = "model.diffusion_model."  # Of the transformer; the VAE's file has none.

# What holds no weight of these models, or is computed anew: other networks that a file may carry,
# tables, embeddings that are not used, the discriminator.
NOT_OURS = re.compile(
  r"(conditioner|first_stage_model|loss)\..*"
  r"|.*\.(freqs_sin|freqs_cos)"
  r"|.*transformer\.(word_embeddings|position_embeddings|embed_tokens|position_embedding)\..*"
)

_WHOLE = ((0, 1),)
# diffusers' name without its ending -> SAT's, the parts of it, and into how many it is divided.
_TRANSFORMER: dict[str, tuple[str, tuple[tuple[int, int], ...], int]] = {
  "patch_embed.proj": ("mixins.patch_embed.proj", _WHOLE, 1),
  "patch_embed.text_proj": ("mixins.patch_embed.text_proj", _WHOLE, 1),
  "patch_embed.pos_embedding": ("mixins.pos_embed.pos_embedding", _WHOLE, 1),
  "time_embedding.linear_1": ("time_embed.0", _WHOLE, 1),
  "time_embedding.linear_2": ("time_embed.2", _WHOLE, 1),
  "ofs_embedding.linear_1": ("ofs_embed.0", _WHOLE, 1),
  "ofs_embedding.linear_2": ("ofs_embed.2", _WHOLE, 1),
  # The names of the two last norms cross, and their shapes are the same.
  "norm_final": ("transformer.final_layernorm", _WHOLE, 1),
  "norm_out.norm": ("mixins.final_layer.norm_final", _WHOLE, 1),
  "norm_out.linear": ("mixins.final_layer.adaLN_modulation.1", _WHOLE, 1),
  "proj_out": ("mixins.final_layer.linear", _WHOLE, 1),
}
_BLOCK: dict[str, tuple[str, tuple[tuple[int, int], ...], int]] = {
  "norm1.norm": ("transformer.layers.{i}.input_layernorm", _WHOLE, 1),
  "norm2.norm": ("transformer.layers.{i}.post_attention_layernorm", _WHOLE, 1),
  # Twelve: (shift, scale, gate) of attention and MLP for vision, then the same for text.
  "norm1.linear": ("mixins.adaln_layer.adaLN_modulations.{i}.1", ((0, 3), (6, 9)), 12),
  "norm2.linear": ("mixins.adaln_layer.adaLN_modulations.{i}.1", ((3, 6), (9, 12)), 12),
  "attn1.to_q": ("transformer.layers.{i}.attention.query_key_value", ((0, 1),), 3),
  "attn1.to_k": ("transformer.layers.{i}.attention.query_key_value", ((1, 2),), 3),
  "attn1.to_v": ("transformer.layers.{i}.attention.query_key_value", ((2, 3),), 3),
  "attn1.to_out.0": ("transformer.layers.{i}.attention.dense", _WHOLE, 1),
  "attn1.norm_q": ("mixins.adaln_layer.query_layernorm_list.{i}", _WHOLE, 1),
  "attn1.norm_k": ("mixins.adaln_layer.key_layernorm_list.{i}", _WHOLE, 1),
  "ff.net.0.proj": ("transformer.layers.{i}.mlp.dense_h_to_4h", _WHOLE, 1),
  "ff.net.2": ("transformer.layers.{i}.mlp.dense_4h_to_h", _WHOLE, 1),
}


def load_transformer(path: epath.PathLike, config: DiTConfig) -> Params:
  """The transformer of a SAT checkpoint of this config.

  path: a .pt file (with the extra `convert`), or its tensors in safetensors.

  Raises:
    UserError: the file is damaged, or is not of a model of this config.
  """
  return _load(path, TRANSFORMER, config)


def load_vae(path: epath.PathLike, config: VAEConfig) -> Params:
  """As `load_transformer`, of the VAE."""
  return _load(path, AUTOENCODER, config)


def _load(path: epath.PathLike, component: Component, config: Any) -> Params:
  with torch_files.opened(path) as stored:
    return tensors.materialize(read(stored, component, config))


def read(stored: Tensors, component: Component, config: Any) -> Params:
  """The parameters, lazy, that the tensors of a SAT file hold; UserError if they are others."""
  return component.read(FromSAT(stored, sources(component, config)), config)


def as_file(params: Params, component: Component, config: Any) -> "ToSAT":
  """The tensors of a SAT file of these parameters."""
  return ToSAT(component.as_file(params, config), sources(component, config))


def sources(component: Component, config: Any) -> dict[str, "Source"]:
  """Where SAT keeps each tensor that diffusers has of a model: by diffusers' name."""
  rows, shapes = component.rows(config), component.shapes(config)
  found = [slot.name for slot in tensors.slots(rows, shapes)]
  if component is AUTOENCODER:
    return {name: vae_source(name, len(config.channels)) for name in found}
  placed = {name: transformer_source(name) for name in found}
  return {name: source._replace(name=PREFIX + source.name) for name, source in placed.items()}


class Source(NamedTuple):
  """Where SAT keeps a tensor of diffusers'."""

  name: str
  parts: tuple[tuple[int, int], ...]  # Of the first axis, in units of 1 / of; joined in order.
  of: int


def transformer_source(name: str) -> Source:
  """Of a tensor of the transformer, without PREFIX. KeyError for one that SAT does not have."""
  module, ending = _split(name)
  block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
  if block is None:
    source, parts, of = _TRANSFORMER[module]
    return Source(source + ending, parts, of)
  source, parts, of = _BLOCK[block[2]]
  return Source(source.format(i=block[1]) + ending, parts, of)


def vae_source(name: str, levels: int) -> Source:
  """Of a tensor of a VAE with so many levels."""
  renamed = re.sub(r"^(\w+)\.down_blocks\.(\d+)\.", r"\1.down.\2.", name)
  renamed = re.sub(
    r"^(\w+)\.up_blocks\.(\d+)\.", lambda m: f"{m[1]}.up.{levels - 1 - int(m[2])}.", renamed
  )
  renamed = re.sub(
    r"\.mid_block\.resnets\.(\d+)\.", lambda m: f".mid.block_{int(m[1]) + 1}.", renamed
  )
  renamed = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", renamed)
  renamed = renamed.replace(".resnets.", ".block.").replace("conv_shortcut", "nin_shortcut")
  return Source(renamed, _WHOLE, 1)


class FromSAT(Tensors):
  """SAT's tensors under diffusers' names.

  Raises UserError for a tensor that is no part of these models, or that is missing.
  """

  def __init__(self, stored: Tensors, sources: Mapping[str, Source]):
    """sources: by diffusers' name, of every tensor that the model has."""
    self._stored, self._sources = stored, sources
    wanted = {source.name for source in sources.values()}
    found = {name for name in stored if not NOT_OURS.fullmatch(name)}
    # 2B and 1.5 files may keep the table of positions that is computed here.
    computed = {f"{PREFIX}mixins.pos_embed.pos_embedding"} - wanted
    check_names(found - computed, wanted)

  def spec(self, name: str) -> Spec:
    source = self._sources[name]
    dtype, shape = self._stored.spec(source.name)
    return Spec(dtype, (_unit(source, shape) * _count(source), *shape[1:]))

  def __getitem__(self, name: str) -> np.ndarray:
    source = self._sources[name]
    tensor = self._stored[source.name]
    if source.parts == _WHOLE and source.of == 1:
      return tensor
    size = _unit(source, tensor.shape)
    return np.concatenate([tensor[size * start : size * stop] for start, stop in source.parts])

  def __iter__(self) -> Iterator[str]:
    return iter(self._sources)

  def __len__(self) -> int:
    return len(self._sources)


def _unit(source: Source, shape: tuple[int, ...]) -> int:
  """How many rows of SAT's tensor one of its parts has."""
  size, rest = divmod(shape[0], source.of)
  if rest:
    raise UserError(f"{source.name} has {shape[0]} rows, not a multiple of {source.of}.")
  return size


def _count(source: Source) -> int:
  return sum(stop - start for start, stop in source.parts)


class ToSAT(Tensors):
  """diffusers' tensors under SAT's names; undoes `FromSAT`."""

  def __init__(self, stored: Tensors, sources: Mapping[str, Source]):
    self._stored = stored
    self._members: dict[str, list[tuple[str, Source]]] = defaultdict(list)
    for name, source in sources.items():
      self._members[source.name].append((name, source))

  def spec(self, name: str) -> Spec:
    specs = [self._stored.spec(member) for member, _ in self._members[name]]
    return Spec(specs[0].dtype, (sum(spec.shape[0] for spec in specs), *specs[0].shape[1:]))

  def __getitem__(self, name: str) -> np.ndarray:
    pieces = []
    for member, source in self._members[name]:
      tensor = self._stored[member]
      unit = tensor.shape[0] // _count(source)
      lengths = [unit * (stop - start) for start, stop in source.parts]
      starts = (start for start, _ in source.parts)
      pieces += zip(starts, np.split(tensor, np.cumsum(lengths[:-1])), strict=True)
    ordered = [piece for _, piece in sorted(pieces, key=lambda piece: piece[0])]
    return ordered[0] if len(ordered) == 1 else np.concatenate(ordered)

  def __iter__(self) -> Iterator[str]:
    return iter(self._members)

  def __len__(self) -> int:
    return len(self._members)


_LORA_MODULES = {
  ("query_key_value", "0"): "to_q",
  ("query_key_value", "1"): "to_k",
  ("query_key_value", "2"): "to_v",
  ("dense", "0"): "to_out.0",
}
_LORA = re.compile(
  r".*transformer\.layers\.(?P<layer>\d+)\.attention\.(?P<module>query_key_value|dense)"
  r"\.matrix_(?P<matrix>[AB])\.(?P<part>\d)"
)


def lora_names(found: Iterable[str]) -> dict[str, str]:
  """diffusers' names (`transformer_blocks...`) of SAT's LoRA tensors among the names -> these."""
  result = {}
  for name in found:
    if (match := _LORA.fullmatch(name)) and (match["module"], match["part"]) in _LORA_MODULES:
      module = _LORA_MODULES[match["module"], match["part"]]
      block = f"transformer_blocks.{match['layer']}.attn1"
      result[f"{block}.{module}.lora_{match['matrix']}.weight"] = name
  return result


def lora_name(name: str) -> str:
  """SAT's name of a LoRA tensor of diffusers' (`transformer_blocks...`).

  Raises:
    UserError: it is of a module that SAT's LoRA does not change.
  """
  match = re.fullmatch(r"transformer_blocks\.(\d+)\.attn1\.(.+)\.lora_([AB])\.weight", name)
  of_module = {module: key for key, module in _LORA_MODULES.items()}
  if match is None or match[2] not in of_module:
    raise UserError(f"SAT's LoRA has no place for {name}; it changes {', '.join(of_module)}.")
  module, part = of_module[match[2]]
  return f"{PREFIX}transformer.layers.{match[1]}.attention.{module}.matrix_{match[3]}.{part}"


def _split(name: str) -> tuple[str, str]:
  """The module, and `.weight` or `.bias` if there is one."""
  match = re.fullmatch(r"(.+?)(\.weight|\.bias)?", name)
  assert match is not None  # It matches everything.
  return match[1], match[2] or ""
