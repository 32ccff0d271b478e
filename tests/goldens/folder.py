"""A folder of reference tensors: its index, its cases and its models."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

from cogvideox_jax.conversion import diffusers

VAE_CLASS = "AutoencoderKLCogVideoX"
LOADS = {
  "CogVideoXTransformer3DModel": diffusers.load_transformer,
  VAE_CLASS: diffusers.load_vae,
  "T5EncoderModel": diffusers.load_text_encoder,
}
Model = tuple[Any, dict]  # Config and parameters.


class CaseError(Exception):
  """A case that cannot be compared: the folder lacks something, or holds an unknown kind."""


class Stored(dict[str, np.ndarray]):
  """The tensors of a case by name."""

  def __missing__(self, name: str) -> np.ndarray:
    raise CaseError(f"the case has no tensor {name}")


class Case(NamedTuple):
  """A case of a folder."""

  name: str
  entry: Mapping[str, Any]  # Its entry of the index.
  stored: Stored
  folder: "Folder"

  @property
  def call(self) -> Mapping[str, Any]:
    """The arguments of the reference."""
    return self.entry["call"]

  def model(self) -> Model:
    """The one network that the case runs."""
    return self.folder.model(self.entry["model"])


class Folder:
  """A folder of reference tensors, with the models that were loaded of it."""

  def __init__(self, path: Path, replaced: Mapping[str, Model] | None = None):
    """replaced: models by name, taken instead of those in the folder."""
    self.path = path
    self.index = json.loads((path / "index.json").read_text())
    self.cases: dict[str, dict] = self.index["cases"]
    self.sat: dict[str, dict] = self.index.get("sat", {})
    self.model = functools.cache(self._load)
    self._replaced = replaced or {}

  @property
  def names(self) -> list[str]:
    """All cases; `sat:NAME` for a SAT file, on which its model's cases are run."""
    return [*self.cases, *(f"sat:{name}" for name in self.sat)]

  def _load(self, name: str) -> Model:
    if name in self._replaced:
      return self._replaced[name]
    model = self.index["models"][name]
    return LOADS[model["class"]](self.path / model["dir"])

  def case(self, name: str) -> Case:
    entry = self.cases[name]
    return Case(name, entry, Stored(load_file(self.path / entry["file"])), self)

  def with_model(self, name: str, model: Model) -> "Folder":
    """The same folder with another model in place of one."""
    return Folder(self.path, {**self._replaced, name: model})

  def cases_of(self, model: str) -> list[str]:
    """The cases that run a model of `models/`; those of LoRA files change its weights."""

    def runs(entry: Mapping[str, Any]) -> bool:
      components = entry["model"]
      if isinstance(components, dict):  # A pipeline; some load a folder of their own.
        own = "folder" in components
        return not own and model in (components["vae"], components["transformer"])
      return components == model and entry["kind"] != "lora"

    return [name for name, entry in self.cases.items() if runs(entry)]
