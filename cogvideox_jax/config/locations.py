"""Makes the paths in a config absolute, so that they hold in any folder and in later runs."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from cogvideox_jax import paths
from cogvideox_jax.config.read import entries, leaves
from cogvideox_jax.config_keys import Key
from cogvideox_jax.errors import UserError

_Config = TypeVar("_Config")


def with_absolute_paths(config: _Config) -> _Config:
  """Returns a typed config whose paths are absolute.

  Relative ones are taken from the current folder. Empty texts stay, and so do names, such as those
  of shipped models.

  Raises:
    UserError: names the key whose path cannot be made absolute.
  """
  return _absolute(config, "config")


def path_keys(config: Any) -> dict[str, Key]:
  """Returns the keys of a typed config that hold paths, by names such as `data.path`."""
  return {
    leaf.name.removeprefix("config."): leaf.key for leaf in leaves(config) if leaf.key.is_path
  }


def absolute_text(text: str, key: Key) -> str:
  """Returns a text of a key that holds paths as an absolute path; a name stays."""
  return text if not text or text in key.names else paths.absolute(text)


def _absolute(group: Any, name: str) -> Any:
  changed = {}
  for entry in entries(type(group)):
    value, where = getattr(group, entry.name), f"{name}.{entry.name}"
    if dataclasses.is_dataclass(value):
      changed[entry.name] = _absolute(value, where)
    elif isinstance(value, Mapping):
      changed[entry.name] = MappingProxyType(
        {chosen: _absolute(one, f"{where}.{chosen}") for chosen, one in value.items()}
      )
    elif entry.key.is_path:
      changed[entry.name] = _absolute_value(value, entry.key, where)
  return dataclasses.replace(group, **changed)


def _absolute_value(value: str | tuple[str, ...], key: Key, name: str) -> str | tuple[str, ...]:
  try:
    if isinstance(value, str):
      return absolute_text(value, key)
    return tuple(absolute_text(text, key) for text in value)
  except UserError as error:
    raise UserError(f"{name}: {error}") from error
