"""Component folders as diffusers and transformers write them: `config.json` and safetensors.

`load_*` and `save_*` take the component's own folder, such as MODEL/transformer. Weights keep the
dtype of the file in both directions, bfloat16 included.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cogvideox_jax.conversion import configs, names, tensors
from cogvideox_jax.conversion.tensors import Params
from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.diffusion.noise import NoiseConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit import DiT, DiTConfig
from cogvideox_jax.models.t5 import T5Config, T5Encoder
from cogvideox_jax.models.vae import VAE, VAEConfig

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"  # File names, without their endings.
TRANSFORMERS_WEIGHTS = "model"
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MAX_SHARD_BYTES = 5_000_000_000
TIED = {"encoder.embed_tokens.weight": "shared.weight"}  # Two names of T5's one embedding.


def load_transformer(folder: epath.PathLike) -> tuple[DiTConfig, Params]:
  """Config and parameters (host arrays) of the DiT in a folder.

  Raises:
    UserError: a file is missing or damaged, the weights are not those of a model of the config,
      or the config asks for what our DiT does not do.
  """
  config = configs.read_transformer(*read_fields(folder, "config.json"))
  weights = open_safetensors(_weight_files(folder, DIFFUSERS_WEIGHTS))
  return config, _read(weights, DiT, config, names.transformer(config))


def load_vae(folder: epath.PathLike) -> tuple[VAEConfig, Params]:
  """As `load_transformer`, of the VAE."""
  config = configs.read_vae(*read_fields(folder, "config.json"))
  weights = open_safetensors(_weight_files(folder, DIFFUSERS_WEIGHTS))
  return config, _read(weights, VAE, config, names.vae(config))


def load_text_encoder(folder: epath.PathLike) -> tuple[T5Config, Params]:
  """As `load_transformer`, of the T5 encoder."""
  config = configs.read_text_encoder(*read_fields(folder, "config.json"))
  weights = Weights(_weight_files(folder, TRANSFORMERS_WEIGHTS), TIED)
  return config, _read(weights, T5Encoder, config, names.text_encoder(config))


def load_scheduler(folder: epath.PathLike) -> NoiseConfig:
  """The noise schedule in a `scheduler` folder, whichever solver it names."""
  return configs.read_noise(*read_fields(folder, "scheduler_config.json"))


def load_tokenizer(folder: epath.PathLike) -> Tokenizer:
  return Tokenizer(folder)


def save_transformer(folder: epath.PathLike, config: DiTConfig, params: Params):
  """Writes the DiT so that both diffusers and `load_transformer` read it.

  Raises:
    UserError: the parameters are not those of a model of the config.
  """
  _write(folder, DIFFUSERS_WEIGHTS, _named(DiT, config, names.transformer(config), params))
  write_fields(folder, "config.json", configs.write_transformer(config))


def save_vae(folder: epath.PathLike, config: VAEConfig, params: Params):
  _write(folder, DIFFUSERS_WEIGHTS, _named(VAE, config, names.vae(config), params))
  write_fields(folder, "config.json", configs.write_vae(config))


def save_text_encoder(folder: epath.PathLike, config: T5Config, params: Params):
  named = _named(T5Encoder, config, names.text_encoder(config), params)
  _write(folder, TRANSFORMERS_WEIGHTS, named)
  write_fields(folder, "config.json", configs.write_text_encoder(config))


def save_scheduler(folder: epath.PathLike, config: NoiseConfig):
  write_fields(folder, "scheduler_config.json", configs.write_noise(config))


def save_tokenizer(folder: epath.PathLike, tokenizer: Tokenizer):
  """Copies the tokenizer's files: the pieces, and what transformers wants beside them."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / tokenizer.file.name).write_bytes(tokenizer.file.read_bytes())
  for name in TOKENIZER_SETTINGS:
    if (file := tokenizer.file.parent / name).exists():
      (folder / name).write_bytes(file.read_bytes())


def open_safetensors(paths: Iterable[epath.Path]) -> "Weights":
  """All tensors of some safetensors files; UserError if one is damaged."""
  return Weights(paths, {})


class Weights(Mapping[str, np.ndarray]):
  """The tensors of safetensors files, read from disk when asked for."""

  def __init__(self, paths: Iterable[epath.Path], aliases: Mapping[str, str]):
    self._files = {}
    for path in paths:
      file = _open(path)
      stored = file.keys()
      self._files.update({name: (file, name) for name in stored})
    for alias, name in aliases.items():
      if alias in self._files:
        self._files.setdefault(name, self._files[alias])
        del self._files[alias]

  def __getitem__(self, name: str) -> np.ndarray:
    file, name = self._files[name]  # The name in the file, if this is an alias.
    return file.get_tensor(name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)


def _weight_files(folder: epath.PathLike, stem: str) -> list[epath.Path]:
  folder = epath.Path(folder)
  index = folder / f"{stem}.safetensors.index.json"
  if index.exists():
    fields, where = read_fields(folder, index.name)
    files = [folder / name for name in sorted(set(fields.get("weight_map", {}).values()))]
  else:
    files, where = [folder / f"{stem}.safetensors"], os.fspath(folder)
  missing = [file.name for file in files if not file.exists()]
  if missing or not files:
    raise UserError(
      f"{where} has no weights: {', '.join(missing) or 'its index is empty'}.\nFetch the folder "
      "again, with its .safetensors files; weights in .bin or .pt files are not read."
    )
  return files


def _open(path: epath.Path):
  try:
    return safe_open(os.fspath(path), framework="np")
  except SafetensorError as error:
    raise UserError(f"{path} is damaged or incomplete ({error}); fetch it again.") from error


def read_fields(folder: epath.PathLike, name: str) -> tuple[dict[str, Any], str]:
  """The fields of a JSON file, and its path for errors."""
  path = epath.Path(folder) / name
  if not path.exists():
    raise UserError(f"There is no {path}.\nIs {folder} a folder of a diffusers model?")
  try:
    fields = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f"{path} is not JSON ({error}); fetch it again.") from error
  if not isinstance(fields, dict):
    raise UserError(f"{path} must hold one JSON object.")
  return fields, os.fspath(path)


def write_fields(folder: epath.PathLike, name: str, fields: Mapping[str, Any]):
  """Writes a JSON file of a model folder, making the folder."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / name).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _read(weights: Weights, model: Callable[..., nnx.Module], config, rows) -> Params:
  return tensors.read(weights, rows, tensors.abstract_params(model, config))


def _named(
  model: Callable[..., nnx.Module], config, rows, params
) -> Iterator[tuple[str, np.ndarray]]:
  return tensors.write(params, rows, tensors.abstract_params(model, config))


def _write(folder: epath.PathLike, stem: str, named: Iterator[tuple[str, np.ndarray]]):
  """Writes shards of at most MAX_SHARD_BYTES, holding one at a time, and their index if many.

  What the folder held before stays until the new files are complete.
  """
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  shards, total = [], 0
  for shard in _shards(named):
    path = folder / f"{stem}-{len(shards)}.partial"
    save_file(shard, os.fspath(path), metadata={"format": "pt"})
    shards.append((path, list(shard)))
    total += sum(tensor.nbytes for tensor in shard.values())
  for old in folder.glob(f"{stem}*.safetensors*"):
    old.unlink()
  if len(shards) == 1:
    shards[0][0].rename(folder / f"{stem}.safetensors")
    return
  weight_map = {}
  for number, (path, keys) in enumerate(shards, start=1):
    name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
    path.rename(folder / name)
    weight_map.update(dict.fromkeys(keys, name))
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  write_fields(folder, f"{stem}.safetensors.index.json", index)


def _shards(named: Iterator[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
  shard, size = {}, 0
  for name, tensor in named:
    if shard and size + tensor.nbytes > MAX_SHARD_BYTES:
      yield shard
      shard, size = {}, 0
    shard[name] = tensor
    size += tensor.nbytes
  yield shard
