"""Writes a model in one of three layouts: diffusers', ours with Orbax arrays, or SAT's."""

import contextlib
from collections.abc import Callable, Iterator

from etils import epath

from cogvideox_jax.conversion import card, diffusers, orbax, sat_release
from cogvideox_jax.conversion.components import COMPONENTS
from cogvideox_jax.conversion.folder import INDEX, check_average, open_network
from cogvideox_jax.conversion.model_contents import Model, Network, write_safetensors
from cogvideox_jax.data import drafts
from cogvideox_jax.data.files import disk_errors
from cogvideox_jax.errors import UserError


def read_folder(path: epath.Path) -> Model:
  """The contents of a model folder with safetensors or Orbax weights; it may lack components.

  Raises:
    UserError: the folder has no network, or a damaged one.
  """
  model = Model(card.Origin.of(path))
  for name in COMPONENTS:
    check_average(path, name)
    if (folder := path / name).is_dir():
      fields, _ = diffusers.read_fields(folder, diffusers.CONFIG)
      model.networks[name] = Network(name, *open_network(name, folder), fields)
  if not model.networks:
    raise UserError(
      f"{path} holds none of {', '.join(COMPONENTS)}.\n"
      "Give a model folder, a training workdir, or a release of SAT's."
    )
  model.add_files(path, path / "tokenizer")
  return model


def write(model: Model, target: epath.Path, layout: str) -> None:
  """Writes a model, with a card that names its source and its files.

  The target appears under its name only when it is complete.

  layout: one of LAYOUTS.

  Raises:
    UserError: the target exists already, or the layout cannot hold the model.
  """
  with becoming(target) as draft:
    LAYOUTS[layout](model, draft)
    if model.scheduler is not None:
      diffusers.write_fields(draft / "scheduler", diffusers.SCHEDULER_CONFIG, model.scheduler)
    if model.index is not None:
      diffusers.write_fields(draft, INDEX, model.index)
    configs = {name: network.config for name, network in model.networks.items()}
    card.write(draft, model.origin, configs, layout, model.notes)


@contextlib.contextmanager
def becoming(target: epath.Path) -> Iterator[epath.Path]:
  """A draft folder that is renamed to the target at the end; after an error it is removed.

  Removes the drafts of the same target that killed runs left. They are known by the lock in them,
  so nothing else is removed.
  """
  check_target(target)
  with disk_errors(target):
    target.parent.mkdir(parents=True, exist_ok=True)
  with drafts.folder_beside(target) as draft:
    yield draft
    if target.exists():
      target.rmdir()
    draft.rename(target)


def check_target(target: epath.Path) -> None:
  """Raises a UserError if the target is there already, and is no empty folder."""
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise UserError(f"{target} is there already: choose another --target, or delete it.")


def _write_diffusers(model: Model, target: epath.Path) -> None:
  for name, network in model.networks.items():
    write_safetensors(network, target / name)
  model.copy_tokenizer(target / "tokenizer")


def _write_orbax(model: Model, target: epath.Path) -> None:
  for name, network in model.networks.items():
    orbax.write_weights(target / name, network.params)
    diffusers.write_fields(target / name, diffusers.CONFIG, network.fields)
  model.copy_tokenizer(target / "tokenizer")


LAYOUTS: dict[str, Callable[[Model, epath.Path], None]] = {
  "orbax": _write_orbax,
  "diffusers": _write_diffusers,
  "sat": sat_release.write,
}
