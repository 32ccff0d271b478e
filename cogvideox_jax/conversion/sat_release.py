"""Reads and writes releases of SAT, and single files of its transformer or VAE."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from cogvideox_jax.conversion import component_fields, diffusers, sat, sat_config, torch_files
from cogvideox_jax.conversion.card import Origin
from cogvideox_jax.conversion.components import COMPONENTS
from cogvideox_jax.conversion.folder import Settings, index_fields, open_network
from cogvideox_jax.conversion.model_contents import Model, Network, write_safetensors
from cogvideox_jax.conversion.sat_names import PREFIX
from cogvideox_jax.conversion.tensors import Tensors
from cogvideox_jax.errors import UserError

# The paths in THUDM's releases.
TRANSFORMER_FILE = "transformer/1000/mp_rank_00_model_states.pt"
VAE_FILE = "vae/3d-vae.pt"
TEXT_FOLDER = "t5-v1_1-xxl"  # The text encoder in transformers' layout, and the tokenizer.


def is_release(path: epath.Path) -> bool:
  """Whether a path is a .pt file, a folder laid out like THUDM's releases, or one of a training."""
  if path.is_dir():
    return bool(_torch_files(path))
  return path.suffix in (".pt", ".pth", ".bin")


def _torch_files(path: epath.Path) -> dict[str, epath.Path]:
  """The .pt files of transformer and VAE that a release has, or that a training of SAT saved."""
  if not (path / "transformer").is_dir() and (file := _training_file(path)):
    return {"transformer": file}
  found = {}
  for name in ("transformer", "vae"):
    files = sorted(path.glob(f"{name}/*.pt")) + sorted(path.glob(f"{name}/*/*.pt"))
    if len(files) > 1:
      raise UserError(f"{path / name} holds {len(files)} .pt files; keep the one to convert.")
    if files:
      found[name] = files[0]
  return found


def _training_file(path: epath.Path) -> epath.Path | None:
  """The checkpoint in a folder of SAT's training: ITERATION/mp_rank_00_model_states.pt.

  Of several iterations, the file `latest` names one.

  Raises:
    UserError: the checkpoint is in parts, or nothing says which of several is meant.
  """
  latest = path / "latest"
  folders = [path, *sorted(folder for folder in path.iterdir() if folder.is_dir())]
  if latest.exists():
    folders = [path / latest.read_text().strip()]
  whole = [file for folder in folders for file in sorted(folder.glob("mp_rank_*_states.pt"))]
  parts = [file for folder in folders for file in folder.glob("*zero_pp_rank_*_model_states.pt")]
  if parts:
    raise UserError(
      f"{parts[0].parent} holds parts of a ZeRO-3 training, each with a piece of every weight.\n"
      "Join them with the zero_to_fp32.py that DeepSpeed wrote beside them, and give its .pt file."
    )
  if len({file.parent for file in whole}) > 1:
    listed = ", ".join(sorted({file.parent.name for file in whole}))
    raise UserError(f"{path} holds several checkpoints ({listed}): give the path of one.")
  if len(whole) > 1:
    raise UserError(
      f"{whole[0].parent} holds {len(whole)} files of model-parallel ranks; only a checkpoint of "
      "one rank is read.\nMerge them with SAT (model_parallel_size 1) first."
    )
  return whole[0] if whole else None


@contextlib.contextmanager
def opened(path: epath.Path) -> Iterator[Model]:
  """The model of a release or of a single file of its transformer or VAE.

  The parameters are lazy, and can be read inside the context only. `convert` writes our config.json
  files into a release; they are used if they are there. Otherwise configs are derived from the
  shapes of the weights.

  Raises:
    UserError: a file is damaged, or does not hold a known model.
  """
  folder = path if path.is_dir() else path.parent
  files = _torch_files(path) if path.is_dir() else {"": path}
  model = Model(Origin.of(path))
  with contextlib.ExitStack() as stack:
    for name, file in files.items():
      stored = stack.enter_context(torch_files.opened(file))
      is_transformer = any(key.startswith(PREFIX) for key in stored)
      name = name or ("transformer" if is_transformer else "vae")
      fields = _config_fields(folder / name) if path.is_dir() else None
      config = _config(name, stored, fields, model)
      params = sat.read(stored, COMPONENTS[name], config)
      model.networks[name] = Network(name, config, params, fields)
    if path.is_dir():
      _add_text(model, path)
    yield model


def _config_fields(folder: epath.Path) -> dict[str, Any] | None:
  """The fields of a config.json; None if there is no such file."""
  if not (folder / diffusers.CONFIG).exists():
    return None
  return diffusers.read_fields(folder, diffusers.CONFIG)[0]


def _config(name: str, stored: Tensors, fields: Mapping[str, Any] | None, model: Model) -> Any:
  """The network's config. If the release has a transformer, `model` must have it already."""
  if fields is not None:
    return COMPONENTS[name].read_config(fields, f"{name}/{diffusers.CONFIG}")
  if name == "transformer":
    return sat_config.transformer(stored)
  transformer = model.networks.get("transformer")
  if transformer is None:
    raise UserError(
      "The file of SAT's VAE does not say its scaling factor, which is 1.15258426 for 2B and 0.7 "
      "for the others:\nconvert the whole release, with its transformer."
    )
  return sat_config.vae(transformer.config)


def _add_text(model: Model, path: epath.Path) -> None:
  """Adds the text encoder and the tokenizer, and what else is needed to sample."""
  tokenizer = path / "tokenizer"
  for file in path.glob(f"*/{diffusers.CONFIG}"):
    fields, _ = diffusers.read_fields(file.parent, file.name)
    if fields.get("model_type") == "t5":
      network = open_network("text_encoder", file.parent)
      model.networks["text_encoder"] = Network("text_encoder", *network, fields)
      if list(file.parent.glob("*.model")):
        tokenizer = file.parent
  model.add_files(path, tokenizer)
  transformer = model.networks.get("transformer")
  if transformer and model.scheduler is None:
    model.scheduler = component_fields.write_noise(sat_config.noise(transformer.config))
  is_complete = model.networks.keys() == COMPONENTS.keys() and model.tokenizer is not None
  if transformer and is_complete and model.index is None:
    # SAT's training replaces a dropped caption by zeros; diffusers' sampler uses the encoded "".
    model.index = index_fields(Settings(text_drop="zeros"), transformer.config.takes_image)


def write(model: Model, target: epath.Path) -> None:
  """Writes a release, and our config.json files, so that reading it again loses nothing.

  SAT ignores those files.
  """
  for name, file, container in (
    ("transformer", TRANSFORMER_FILE, "module"),
    ("vae", VAE_FILE, "state_dict"),
  ):
    if network := model.networks.get(name):
      (target / file).parent.mkdir(parents=True)
      found = sat.as_file(network.params, network.component, network.config)
      torch_files.write(target / file, container, found)
      diffusers.write_fields(target / name, diffusers.CONFIG, network.fields)
  if "transformer" in model.networks:
    (target / "transformer" / "latest").write_text("1000")
  if network := model.networks.get("text_encoder"):
    write_safetensors(network, target / TEXT_FOLDER)
  model.copy_tokenizer(target / TEXT_FOLDER)
