"""A model of one layout written in another: diffusers', ours with Orbax arrays, SAT's.

A `Model` says what of a model there is, with parameters that are read as they are written, so that
memory holds a layer or so. A target folder appears under its name once it is whole.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from cogvideox_jax.conversion import (
  card,
  component_fields,
  diffusers,
  orbax,
  sat,
  sat_config,
  torch_files,
)
from cogvideox_jax.conversion.components import COMPONENTS, Component
from cogvideox_jax.conversion.folder import INDEX, Settings, index_fields, open_network
from cogvideox_jax.conversion.tensors import Lazy, Params, Place
from cogvideox_jax.errors import UserError

# Where SAT's releases keep things.
SAT_TRANSFORMER = "transformer/1000/mp_rank_00_model_states.pt"
SAT_VAE = "vae/3d-vae.pt"
SAT_TEXT = "t5-v1_1-xxl"  # Text encoder, as transformers has it, and tokenizer.


class Network:
  """A network that is to be written."""

  def __init__(self, name: str, config: Any, params: Params, fields: Mapping[str, Any] | None):
    """fields: of its config.json, where the source has one, which the target keeps as it is."""
    self.component: Component = COMPONENTS[name]
    self.config, self.params = config, params
    self.fields = self.component.write_config(config) if fields is None else fields


@dataclasses.dataclass
class Model:
  """What of a model there is."""

  origin: card.Origin
  networks: dict[str, Network] = dataclasses.field(default_factory=dict)  # By COMPONENTS' names.
  tokenizer: epath.Path | None = None  # Its folder.
  scheduler: Mapping[str, Any] | None = None  # Fields of its config.
  index: Mapping[str, Any] | None = None  # Of model_index.json.

  def map_params(self, change: Callable[[Network], Params]) -> None:
    """Replaces the parameters of every network."""
    for network in self.networks.values():
      network.params = change(network)


def of_folder(path: epath.Path) -> Model:
  """A model folder, whole or with some of its parts, whose weights are safetensors or Orbax.

  Raises:
    UserError: it has no part, or one that is damaged.
  """
  model = Model(card.Origin.of(path))
  for name in COMPONENTS:
    if (part := path / name).is_dir():
      fields, _ = diffusers.read_fields(part, diffusers.CONFIG)
      model.networks[name] = Network(name, *open_network(name, part), fields)
  if not model.networks:
    raise UserError(
      f"{path} holds none of {', '.join(COMPONENTS)}.\n"
      "Give a model folder, a training workdir, or a release of SAT's."
    )
  _add_files(model, path, path / "tokenizer")
  return model


def _add_files(model: Model, path: epath.Path, tokenizer: epath.Path) -> None:
  """What is beside the networks, as far as it is there."""
  if tokenizer.is_dir():
    model.tokenizer = tokenizer
  if (path / "scheduler").is_dir():
    model.scheduler, _ = diffusers.read_fields(path / "scheduler", diffusers.SCHEDULER_CONFIG)
  if (path / INDEX).exists():
    model.index, _ = diffusers.read_fields(path, INDEX)


def is_sat(path: epath.Path) -> bool:
  """Whether a path is SAT's: a .pt file, or a folder laid out as THUDM's releases are."""
  if path.is_dir():
    return bool(_sat_files(path))
  return path.suffix in (".pt", ".pth", ".bin")


def _sat_files(path: epath.Path) -> dict[str, epath.Path]:
  """The files of the transformer and of the VAE that there are in a release."""
  found = {}
  for name in ("transformer", "vae"):
    files = sorted(path.glob(f"{name}/*.pt")) + sorted(path.glob(f"{name}/*/*.pt"))
    if len(files) > 1:
      raise UserError(f"{path / name} holds {len(files)} .pt files; keep the one to convert.")
    if files:
      found[name] = files[0]
  return found


@contextlib.contextmanager
def of_sat(path: epath.Path) -> Iterator[Model]:
  """A release of SAT's, or a single file of its transformer or VAE; open while it is converted.

  Configs are those that the folder holds beside SAT's own files, if `convert` wrote them there;
  else they are read off the weights.

  Raises:
    UserError: a file is damaged, or is of no model that is known.
  """
  folder = path if path.is_dir() else path.parent
  files = _sat_files(path) if path.is_dir() else {"": path}
  model = Model(card.Origin.of(path))
  with contextlib.ExitStack() as stack:
    for name, file in files.items():
      stored = stack.enter_context(torch_files.opened(file))
      is_transformer = any(key.startswith(sat.PREFIX) for key in stored)
      name = name or ("transformer" if is_transformer else "vae")
      fields = _beside(folder / name) if path.is_dir() else None
      config = _sat_config(name, stored, fields, model)
      params = sat.read(stored, COMPONENTS[name], config)
      model.networks[name] = Network(name, config, params, fields)
    if path.is_dir():
      _add_sat_text(model, path)
    yield model


def _beside(folder: epath.Path) -> dict[str, Any] | None:
  """The fields of a config.json that is there."""
  if not (folder / diffusers.CONFIG).exists():
    return None
  return diffusers.read_fields(folder, diffusers.CONFIG)[0]


def _sat_config(name: str, stored, fields: Mapping[str, Any] | None, model: Model) -> Any:
  """The network's config. `model` has its transformer already, if there is one."""
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


def _add_sat_text(model: Model, path: epath.Path) -> None:
  """Text encoder and tokenizer, which a release keeps in transformers' layout, and our files."""
  tokenizer = path / "tokenizer"
  for file in path.glob(f"*/{diffusers.CONFIG}"):
    fields, _ = diffusers.read_fields(file.parent, file.name)
    if fields.get("model_type") == "t5":
      network = open_network("text_encoder", file.parent)
      model.networks["text_encoder"] = Network("text_encoder", *network, fields)
      if list(file.parent.glob("*.model")):
        tokenizer = file.parent
  _add_files(model, path, tokenizer)
  transformer = model.networks.get("transformer")
  if transformer and model.scheduler is None:
    model.scheduler = component_fields.write_noise(sat_config.noise(transformer.config))
  whole = model.networks.keys() == COMPONENTS.keys() and model.tokenizer is not None
  if transformer and whole and model.index is None:
    # A dropped caption was zeros in SAT's training; a sampler of diffusers' has the encoded "".
    model.index = index_fields(Settings(text_drop="zeros"), transformer.config.takes_image)


def cast(network: Network, dtype: np.dtype) -> Params:
  """The network's parameters in another type."""
  return jax.tree.map(lambda leaf: _Cast(leaf, dtype), network.params)


class _Cast(Lazy):
  """A parameter in another type."""

  def __init__(self, base: Any, dtype: np.dtype):
    self.shape, self.dtype = base.shape, dtype
    self.places = base.places if isinstance(base, Lazy) else (...,)
    self._base = base

  def __getitem__(self, place: Place) -> np.ndarray:
    return np.asarray(self._base[place]).astype(self.dtype)


def write(model: Model, target: epath.Path, layout: str) -> None:
  """Writes a model, with a card that says where it is from and what its files are.

  layout: one of LAYOUTS.

  Raises:
    UserError: the target is there already, or the layout has no place for the model.
  """
  with _becoming(target) as draft:
    LAYOUTS[layout](model, draft)
    if model.scheduler is not None:
      diffusers.write_fields(draft / "scheduler", diffusers.SCHEDULER_CONFIG, model.scheduler)
    if model.index is not None:
      diffusers.write_fields(draft, INDEX, model.index)
    card.write(draft, model.origin, {name: x.config for name, x in model.networks.items()}, layout)


@contextlib.contextmanager
def _becoming(target: epath.Path) -> Iterator[epath.Path]:
  """A folder that becomes the target at the end; what a killed run left of one is removed."""
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise UserError(f"{target} is there already: choose another --target, or delete it.")
  draft = target.with_name(f"{target.name}.partial")
  if draft.exists():
    draft.rmtree()
  draft.mkdir(parents=True)
  yield draft
  if target.exists():
    target.rmdir()
  draft.rename(target)


def _write_diffusers(model: Model, target: epath.Path) -> None:
  for name, network in model.networks.items():
    _write_safetensors(network, target / name)
  _copy_tokenizer(model, target / "tokenizer")


def _write_safetensors(network: Network, folder: epath.Path) -> None:
  found = network.component.as_file(network.params, network.config)
  diffusers.write_weights(folder, network.component.weights, found)
  diffusers.write_fields(folder, diffusers.CONFIG, network.fields)


def _write_orbax(model: Model, target: epath.Path) -> None:
  for name, network in model.networks.items():
    orbax.save(target / name, network.params)
    diffusers.write_fields(target / name, diffusers.CONFIG, network.fields)
  _copy_tokenizer(model, target / "tokenizer")


def _write_sat(model: Model, target: epath.Path) -> None:
  """With our config.json files, which SAT passes over, so that the way back loses nothing."""
  for name, file, container in (
    ("transformer", SAT_TRANSFORMER, "module"),
    ("vae", SAT_VAE, "state_dict"),
  ):
    if network := model.networks.get(name):
      (target / file).parent.mkdir(parents=True)
      found = sat.as_file(network.params, network.component, network.config)
      torch_files.write(target / file, container, found)
      diffusers.write_fields(target / name, diffusers.CONFIG, network.fields)
  if "transformer" in model.networks:
    (target / "transformer" / "latest").write_text("1000")
  if network := model.networks.get("text_encoder"):
    _write_safetensors(network, target / SAT_TEXT)
  _copy_tokenizer(model, target / SAT_TEXT)


def _copy_tokenizer(model: Model, target: epath.Path) -> None:
  """All files of its folder but the weights and the config of a text encoder beside them."""
  if model.tokenizer is None:
    return
  target.mkdir(parents=True, exist_ok=True)
  for file in model.tokenizer.iterdir():
    if file.is_file() and file.name != diffusers.CONFIG and ".safetensors" not in file.name:
      (target / file.name).write_bytes(file.read_bytes())


LAYOUTS: dict[str, Callable[[Model, epath.Path], None]] = {
  "orbax": _write_orbax,
  "diffusers": _write_diffusers,
  "sat": _write_sat,
}
