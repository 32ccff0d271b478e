"""A model on its way from one layout to another: its networks, tokenizer, scheduler and index.

Parameters are lazy, so that a conversion holds about one layer in memory.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from cogvideox_jax.conversion import diffusers, numbers
from cogvideox_jax.conversion.card import Origin
from cogvideox_jax.conversion.components import COMPONENTS
from cogvideox_jax.conversion.folder import INDEX
from cogvideox_jax.conversion.tensors import Layer, Lazy
from cogvideox_jax.sharding import path_name
from cogvideox_jax.types import Params


class Network:
  """A network that is to be written."""

  def __init__(self, name: str, config: Any, params: Params, fields: Mapping[str, Any] | None):
    """A network of a model.

    Args:
      name: one of COMPONENTS.
      fields: the fields of the source's config.json, which the target keeps as they are; None if
        the source has no such file.
    """
    self.name, self.component = name, COMPONENTS[name]
    self.config, self.params = config, params
    self.fields: Mapping[str, Any] = (
      self.component.write_config(config) if fields is None else fields
    )


@dataclasses.dataclass
class Model:
  """The contents of a model; any of them may be missing."""

  origin: Origin
  networks: dict[str, Network] = dataclasses.field(default_factory=dict)  # By name in COMPONENTS.
  tokenizer: epath.Path | None = None  # The tokenizer's folder.
  scheduler: Mapping[str, Any] | None = None  # The fields of the scheduler's config.
  index: Mapping[str, Any] | None = None  # The fields of model_index.json.
  trained_sizes: tuple[tuple[int, int], ...] = ()  # Height and width in pixels, if known.
  notes: Sequence[str] = ()  # What differs in the library of the target's layout.

  def map_params(self, change: Callable[[Network], Params]) -> None:
    """Replaces the parameters of every network."""
    for network in self.networks.values():
      network.params = change(network)

  def add_files(self, path: epath.Path, tokenizer: epath.Path) -> None:
    """Adds the tokenizer, the scheduler and the index of a model folder, as far as it has them."""
    if tokenizer.is_dir():
      self.tokenizer = tokenizer
    if (path / "scheduler").is_dir():
      self.scheduler, _ = diffusers.read_fields(path / "scheduler", diffusers.SCHEDULER_CONFIG)
    if (path / INDEX).exists():
      self.index, _ = diffusers.read_fields(path, INDEX)

  def copy_tokenizer(self, target: epath.Path) -> None:
    """Copies the tokenizer's files.

    The weights and the config of a text encoder in the same folder, as in SAT's releases, are left
    out.
    """
    if self.tokenizer is None:
      return
    target.mkdir(parents=True, exist_ok=True)
    for file in self.tokenizer.iterdir():
      if file.is_file() and file.name != diffusers.CONFIG and ".safetensors" not in file.name:
        (target / file.name).write_bytes(file.read_bytes())


def checked(network: Network) -> Params:
  """The network's parameters, which raise a UserError when one that is not finite is read."""
  return jax.tree.map_with_path(
    lambda path, leaf: _Checked(leaf, f"{network.name}/{path_name(path)}"), network.params
  )


class _Checked(Lazy):
  """A parameter whose numbers must be finite."""

  def __init__(self, base: Any, name: str):
    self._base, self._name = base, name
    self.shape, self.dtype = base.shape, np.dtype(base.dtype)
    self.layers = base.layers if isinstance(base, Lazy) else (...,)

  def __getitem__(self, layer: Layer) -> np.ndarray:
    array = np.asarray(self._base[layer])
    numbers.check_finite(f"The parameter {self._name}", array)
    return array


def cast(network: Network, dtype: np.dtype) -> Params:
  """The network's parameters, lazily cast to another dtype."""
  return jax.tree.map_with_path(
    lambda path, leaf: _Cast(leaf, dtype, path_name(path)), network.params
  )


class _Cast(Lazy):
  """A parameter in another dtype."""

  def __init__(self, base: Any, dtype: np.dtype, name: str):
    self._name = name  # The parameter's name, for errors.
    self.shape, self.dtype = base.shape, dtype
    self.layers = base.layers if isinstance(base, Lazy) else (...,)
    self._base = base

  def __getitem__(self, layer: Layer) -> np.ndarray:
    return numbers.cast(np.asarray(self._base[layer]), self.dtype, self._name)


def write_safetensors(network: Network, folder: epath.Path) -> None:
  """Writes a component's folder as diffusers or transformers does."""
  found = network.component.as_file(network.params, network.config)
  diffusers.write_weights(folder, network.component.weights, found)
  diffusers.write_fields(folder, diffusers.CONFIG, network.fields)
