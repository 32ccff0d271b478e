"""Reads and writes the parameters in SAT's files, as views on diffusers' tensors.

sat_names.py says which SAT tensor holds which tensor of diffusers.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from cogvideox_jax.conversion import tensors, torch_files
from cogvideox_jax.conversion.components import AUTOENCODER, TRANSFORMER, Component
from cogvideox_jax.conversion.sat_names import (
  NOT_OURS,
  PREFIX,
  Source,
  lora_names,
  transformer_source,
  vae_source,
)
from cogvideox_jax.conversion.tensors import Spec, Tensors, check_names
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.vae_config import VAEConfig
from cogvideox_jax.types import Params


def load_transformer(path: epath.PathLike, config: DiTConfig) -> Params:
  """The transformer of a SAT checkpoint, as host arrays.

  path: a .pt file (needs the extra `convert`), or its tensors as safetensors.

  Raises:
    UserError: the file is damaged, or does not hold a model of this config.
  """
  return _load(path, TRANSFORMER, config)


def load_vae(path: epath.PathLike, config: VAEConfig) -> Params:
  """The VAE of a SAT checkpoint; see `load_transformer`."""
  return _load(path, AUTOENCODER, config)


def _load(path: epath.PathLike, component: Component, config: Any) -> Params:
  with torch_files.opened(path) as stored:
    return tensors.materialize(read(stored, component, config))


def read(stored: Tensors, component: Component, config: Any) -> Params:
  """The lazy parameters that the tensors of a SAT file hold.

  Raises:
    UserError: the tensors are those of another model.
  """
  return component.read(FromSAT(stored, sources(component, config)), config)


def as_file(params: Params, component: Component, config: Any) -> "ToSAT":
  """The tensors that a SAT file of these parameters holds."""
  return ToSAT(component.as_file(params, config), sources(component, config))


def sources(component: Component, config: Any) -> dict[str, Source]:
  """diffusers' name -> where SAT keeps it, for each tensor of a model."""
  rows, shapes = component.rows(config), component.shapes(config)
  found = [slot.name for slot in tensors.slots(rows, shapes)]
  if component is AUTOENCODER:
    return {name: vae_source(name, len(config.channels)) for name in found}
  unprefixed = {name: transformer_source(name) for name in found}
  return {name: source._replace(name=PREFIX + source.name) for name, source in unprefixed.items()}


class FromSAT(Tensors):
  """SAT's tensors under diffusers' names."""

  def __init__(self, stored: Tensors, sources: Mapping[str, Source]):
    """Checks the names.

    sources: diffusers' name -> where SAT keeps it, for each tensor of the model.

    Raises:
      UserError: a tensor is missing, or does not belong to the model.
    """
    self._stored, self._sources = stored, sources
    if lora_names(stored):
      raise UserError(
        "These weights are a base model and a LoRA of SAT in one file.\n"
        "Give the file as --lora, with the base model that it was trained on as the model."
      )
    wanted = {source.name for source in sources.values()}
    found = {name for name in stored if not NOT_OURS.fullmatch(name)}
    # Files of 2B and 1.5 may hold the position table, which is computed here.
    computed = {f"{PREFIX}mixins.pos_embed.pos_embedding"} - wanted
    check_names(found - computed, wanted)

  def spec(self, name: str) -> Spec:
    source = self._sources[name]
    dtype, shape = self._stored.spec(source.name)
    return Spec(dtype, (_unit_rows(source, shape) * source.taken, *shape[1:]))

  def __getitem__(self, name: str) -> np.ndarray:
    source = self._sources[name]
    tensor = self._stored[source.name]
    if source.is_whole:
      return tensor
    rows = _unit_rows(source, tensor.shape)
    return np.concatenate([tensor[rows * start : rows * stop] for start, stop in source.slices])

  def __iter__(self) -> Iterator[str]:
    return iter(self._sources)

  def __len__(self) -> int:
    return len(self._sources)


def _unit_rows(source: Source, shape: tuple[int, ...]) -> int:
  """The number of rows in a unit of a SAT tensor."""
  rows, rest = divmod(shape[0], source.units)
  if rest:
    raise UserError(f"{source.name} has {shape[0]} rows, not a multiple of {source.units}.")
  return rows


class ToSAT(Tensors):
  """diffusers' tensors under SAT's names; undoes `FromSAT`."""

  def __init__(self, stored: Tensors, sources: Mapping[str, Source]):
    """sources: as in `FromSAT`."""
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
      rows = tensor.shape[0] // source.taken
      lengths = [rows * (stop - start) for start, stop in source.slices]
      starts = (start for start, _ in source.slices)
      pieces += zip(starts, np.split(tensor, np.cumsum(lengths[:-1])), strict=True)
    ordered = [piece for _, piece in sorted(pieces, key=lambda piece: piece[0])]
    return ordered[0] if len(ordered) == 1 else np.concatenate(ordered)

  def __iter__(self) -> Iterator[str]:
    return iter(self._members)

  def __len__(self) -> int:
    return len(self._members)
