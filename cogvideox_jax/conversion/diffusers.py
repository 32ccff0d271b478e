"""Reads and writes component folders of diffusers and transformers: `config.json`, safetensors.

`load_*` and `save_*` take the component's own folder, such as MODEL/transformer, and keep the dtype
of the weights, bfloat16 included.
"""

import json
import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from etils import epath

from cogvideox_jax.conversion import (
  component_fields,
  safetensors_file,
  scaled_weights,
  tensors,
  weight_pickles,
)
from cogvideox_jax.conversion.components import (
  AUTOENCODER,
  TEXT_ENCODER,
  TRANSFORMER,
  Component,
)
from cogvideox_jax.conversion.safetensors_file import SafetensorsFiles, plain_name
from cogvideox_jax.conversion.tensors import Tensors
from cogvideox_jax.data.files import new_draft
from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.diffusion.noise import NoiseConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.types import Params

CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MAX_SHARD_BYTES = 5_000_000_000
VARIANTS = ("", ".fp16", ".bf16", ".fp32")  # Endings of weight files, in the order of preference.


def open_weights(component: Component, folder: epath.PathLike, config: Any) -> Params:
  """The lazy parameters of a component in its folder.

  Raises:
    UserError: a file is missing or damaged, or the weights are not those of a model of the config.
  """
  folder = epath.Path(folder)
  if not has_safetensors(folder) and (pickles := weight_pickles.find(folder)):
    return component.read(weight_pickles.read(pickles, component.aliases), config)
  files = _weight_files(folder, component.weights)
  stored = SafetensorsFiles(files, component.aliases)
  return component.read(scaled_weights.unscaled(stored), config)


def has_safetensors(folder: epath.Path) -> bool:
  """Whether a component's folder holds a safetensors file, or an index of some."""
  return any(True for _ in folder.glob("*.safetensors*"))


def load_component(component: Component, folder: epath.PathLike) -> tuple[Any, Params]:
  """Config and parameters (host arrays) of a component in its folder.

  Raises:
    UserError: as in `open_weights`; or our model does not support the config.
  """
  config = component.read_config(*read_fields(folder, CONFIG))
  return config, tensors.materialize(open_weights(component, folder, config))


def save_component(
  component: Component, folder: epath.PathLike, config: Any, params: Params
) -> None:
  """Writes a folder that diffusers or transformers reads, and `load_component`.

  Raises:
    UserError: the parameters are not those of a model of the config.
  """
  write_weights(folder, component.weights, component.as_file(params, config))
  write_fields(folder, CONFIG, component.write_config(config))


load_transformer = partial(load_component, TRANSFORMER)
load_vae = partial(load_component, AUTOENCODER)
load_text_encoder = partial(load_component, TEXT_ENCODER)
save_transformer = partial(save_component, TRANSFORMER)
save_vae = partial(save_component, AUTOENCODER)
save_text_encoder = partial(save_component, TEXT_ENCODER)


def load_scheduler(folder: epath.PathLike) -> NoiseConfig:
  """The noise schedule in a `scheduler` folder of either solver."""
  return component_fields.read_noise(*read_fields(folder, SCHEDULER_CONFIG))


def load_tokenizer(folder: epath.PathLike) -> Tokenizer:
  """The tokenizer in a `tokenizer` folder."""
  return Tokenizer(folder)


def save_scheduler(folder: epath.PathLike, config: NoiseConfig, solver: str = "ddim") -> None:
  """Writes a `scheduler` folder; solver: one of `component_fields.SCHEDULERS`."""
  write_fields(folder, SCHEDULER_CONFIG, component_fields.write_noise(config, solver))


def save_tokenizer(folder: epath.PathLike, tokenizer: Tokenizer) -> None:
  """Copies the files of a tokenizer: its pieces, and the settings that transformers reads."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / tokenizer.file.name).write_bytes(tokenizer.file.read_bytes())
  for name in TOKENIZER_SETTINGS:
    if (file := tokenizer.file.parent / name).exists():
      (folder / name).write_bytes(file.read_bytes())


def _weight_files(folder: epath.PathLike, stem: str) -> list[epath.Path]:
  """The safetensors files in a folder: one, or those that an index lists.

  Without them, those of a variant (`STEM.fp16.safetensors`), or numbered ones without an index.
  """
  folder = epath.Path(folder)
  candidates = [
    folder / name
    for variant in VARIANTS
    for name in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors")
  ]
  where = os.fspath(folder)
  found = next((path for path in candidates if path.exists()), None)
  if found is None:
    files = _numbered(folder, stem) or [folder / f"{stem}.safetensors"]
  elif found.suffix == ".json":
    fields, where = read_fields(folder, found.name)
    named = fields.get("weight_map", {})
    if not isinstance(named, dict):
      raise UserError(f"{found} is damaged: its weight_map is no object; fetch it again.")
    names = {plain_name(name, found) for name in named.values()}
    files = [folder / name for name in sorted(names)]
  else:
    files = [found]
  missing = [file.name for file in files if not file.exists()]
  if missing or not files:
    raise UserError(
      f"{where} has no weights: {', '.join(missing) or 'its index is empty'}.\nFetch the folder "
      "again, with its .safetensors files."
    )
  return files


def _numbered(folder: epath.Path, stem: str) -> list[epath.Path]:
  """All of the files `STEM-00001-of-00003.safetensors`, if there is one of them."""
  pattern = re.compile(re.escape(stem) + r"(\.\w+)?-\d+-of-(\d+)(\.\w+)?\.safetensors")
  found = sorted(filter(None, (pattern.fullmatch(path.name) for path in folder.iterdir())), key=str)
  if not found:
    return []
  first = found[0]
  before, after, total = first[1] or "", first[3] or "", first[2]
  return [
    folder / f"{stem}{before}-{number:0{len(total)}d}-of-{total}{after}.safetensors"
    for number in range(1, int(total) + 1)
  ]


def read_fields(folder: epath.PathLike, name: str) -> tuple[dict[str, Any], str]:
  """The fields of a JSON file, and its path, which errors name.

  Raises:
    UserError: the file is missing, or is no JSON object.
  """
  path = epath.Path(folder) / name
  if not path.exists():
    raise UserError(f"There is no {path}.\nIs {folder} a folder of a diffusers model?")
  try:
    fields = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
    raise UserError(f"{path} is not JSON ({error}); fetch it again.") from error
  if not isinstance(fields, dict):
    raise UserError(f"{path} must hold one JSON object.")
  return fields, os.fspath(path)


def write_fields(folder: epath.PathLike, name: str, fields: Mapping[str, Any]) -> None:
  """Writes a JSON file, and makes its folder if there is none."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / name).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def write_weights(folder: epath.PathLike, stem: str, found: Tensors) -> None:
  """Writes weights in files of at most MAX_SHARD_BYTES, and an index if there are several files.

  One tensor at a time is in memory. Former weight files stay until the new ones are complete. They
  are those that a reader would take before the new ones; all other files stay.
  """
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  shards = _shards(found)
  partial_files = [new_draft(folder / f"{stem}-{number}") for number in range(len(shards))]
  for path, names in zip(partial_files, shards, strict=True):
    safetensors_file.write(path, found, names)
  for old in _former_files(folder, stem):
    old.unlink(missing_ok=True)
  if len(shards) == 1:
    partial_files[0].rename(folder / f"{stem}.safetensors")
    return
  weight_map = {}
  for number, (path, names) in enumerate(zip(partial_files, shards, strict=True), start=1):
    name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
    path.rename(folder / name)
    weight_map.update(dict.fromkeys(names, name))
  total = sum(found.spec(name).nbytes for name in found)
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  write_fields(folder, f"{stem}.safetensors.index.json", index)


def _former_files(folder: epath.Path, stem: str) -> list[epath.Path]:
  """The file of the weights in a folder, their index, and the files that it names."""
  index = folder / f"{stem}.safetensors.index.json"
  found = [folder / f"{stem}.safetensors", index]
  if index.exists():
    names = read_fields(folder, index.name)[0].get("weight_map", {}).values()
    numbered = re.compile(re.escape(stem) + r"-\d+-of-\d+\.safetensors")
    found += [folder / name for name in sorted(set(names)) if numbered.fullmatch(name)]
  return found


def _shards(found: Tensors) -> list[list[str]]:
  """The names of each file's tensors."""
  shards, size = [[]], 0
  for name in found:
    nbytes = found.spec(name).nbytes
    if shards[-1] and size + nbytes > MAX_SHARD_BYTES:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += nbytes
  return shards
