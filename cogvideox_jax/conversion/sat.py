"""SAT's names and layouts (THUDM/CogVideo, folder sat/) for diffusers' tensors, and back.

SAT keeps queries, keys and values in one tensor, and the modulations of a block too; its VAE counts
the decoder's levels from the finest. Everything else is the same tensor under another name. So one
function says, for a tensor of diffusers', which tensor of SAT's holds it and which parts of that
one's first axis.
"""

import contextlib
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from cogvideox_jax.conversion import names, tensors
from cogvideox_jax.conversion.diffusers import open_safetensors
from cogvideox_jax.conversion.tensors import Params, check_names
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit import DiT, DiTConfig
from cogvideox_jax.models.vae import VAE, VAEConfig

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
  """The transformer of a SAT checkpoint, which does not say its config.

  path: a .pt file (with the extra `convert`), or its tensors in safetensors.

  Raises:
    UserError: the file is damaged, or is not of a model of this config.
  """
  rows, shapes = names.transformer(config), tensors.abstract_params(DiT, config)
  sources = transformer_sources(slot.name for slot in tensors.slots(rows, shapes))
  with opened(path) as stored:
    return tensors.read(FromSAT(stored, sources), rows, shapes)


def load_vae(path: epath.PathLike, config: VAEConfig) -> Params:
  """As `load_transformer`, of the VAE."""
  rows, shapes = names.vae(config), tensors.abstract_params(VAE, config)
  found = (slot.name for slot in tensors.slots(rows, shapes))
  sources = vae_sources(found, len(config.channels))
  with opened(path) as stored:
    return tensors.read(FromSAT(stored, sources), rows, shapes)


@contextlib.contextmanager
def opened(path: epath.PathLike) -> Iterator[Mapping[str, np.ndarray]]:
  """The tensors of a .pt or safetensors file, read when asked for."""
  path = epath.Path(path)
  if path.suffix == ".safetensors":
    yield open_safetensors([path])
    return
  # What a pickle holds is read by torch's restricted loader, in a process of its own.
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=".sat-") as folder:
    command = [sys.executable, "-m", "cogvideox_jax.conversion.torch_file", path, folder]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
      reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
      raise UserError(f"{path} cannot be read: {reason}")
    yield open_safetensors(sorted(epath.Path(folder).glob("*.safetensors")))


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


class FromSAT(Mapping[str, np.ndarray]):
  """SAT's tensors under diffusers' names; each is read when asked for.

  Raises UserError for a tensor that is no part of these models, or that is missing.
  """

  def __init__(self, tensors: Mapping[str, np.ndarray], sources: Mapping[str, Source]):
    """sources: by diffusers' name, of every tensor that the model has."""
    self._tensors, self._sources = tensors, sources
    wanted = {source.name for source in sources.values()}
    found = {name for name in tensors if not NOT_OURS.fullmatch(name)}
    # 2B and 1.5 files may keep the table of positions that is computed here.
    computed = {f"{PREFIX}mixins.pos_embed.pos_embedding"} - wanted
    check_names(found - computed, wanted)

  def __getitem__(self, name: str) -> np.ndarray:
    source = self._sources[name]
    tensor = self._tensors[source.name]
    size, rest = divmod(tensor.shape[0], source.of)
    if rest:
      raise UserError(f"{source.name} has {tensor.shape[0]} rows, not a multiple of {source.of}.")
    if source.parts == _WHOLE and source.of == 1:
      return tensor
    return np.concatenate([tensor[size * start : size * stop] for start, stop in source.parts])

  def __iter__(self) -> Iterator[str]:
    return iter(self._sources)

  def __len__(self) -> int:
    return len(self._sources)


def to_sat(
  tensors: Mapping[str, np.ndarray], sources: Mapping[str, Source]
) -> Iterator[tuple[str, np.ndarray]]:
  """diffusers' tensors under SAT's names, one at a time; undoes `FromSAT`."""
  holders = defaultdict(list)
  for name, source in sources.items():
    holders[source.name].append((name, source))
  for holder, members in holders.items():
    pieces = []
    for name, source in members:
      lengths = np.cumsum([stop - start for start, stop in source.parts])
      unit = tensors[name].shape[0] // int(lengths[-1])
      chunks = np.split(tensors[name], lengths[:-1] * unit)
      pieces += zip((start for start, _ in source.parts), chunks, strict=True)
    ordered = [piece for _, piece in sorted(pieces, key=lambda piece: piece[0])]
    yield holder, ordered[0] if len(ordered) == 1 else np.concatenate(ordered)


def transformer_sources(found: Iterable[str]) -> dict[str, Source]:
  """Of all tensors of a transformer, with SAT's prefix."""
  sources = {name: transformer_source(name) for name in found}
  return {name: source._replace(name=PREFIX + source.name) for name, source in sources.items()}


def vae_sources(found: Iterable[str], levels: int) -> dict[str, Source]:
  return {name: vae_source(name, levels) for name in found}


def _split(name: str) -> tuple[str, str]:
  """The module, and `.weight` or `.bias` if there is one."""
  match = re.fullmatch(r"(.+?)(\.weight|\.bias)?", name)
  assert match is not None  # It matches everything.
  return match[1], match[2] or ""
