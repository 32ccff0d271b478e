"""Converts configs: a ConfigDict or JSON to the dataclasses of schema.py, and those to JSON.

All commands, workdirs and datasets read their configs here.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType, UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict

from cogvideox_jax.config_keys import Key, key_of
from cogvideox_jax.errors import UserError

ROOT = "config"  # What messages and flags call the whole config.
_WANTED = {
  bool: "be True or False",
  int: "be a whole number",
  float: "be a number",
  str: "be a text",
}
_Schema = TypeVar("_Schema")


class Entry(NamedTuple):
  """A field that is a config key, or a group of keys."""

  name: str
  key: Key
  type: Any
  default: Any  # dataclasses.MISSING where the config must have the key.


class Leaf(NamedTuple):
  """A key with its value."""

  name: str  # Dotted, from `config.` on.
  key: Key
  value: Any


def read(schema: type[_Schema], values: ConfigDict | Mapping[str, Any]) -> _Schema:
  """The typed form of a config; the same for a ConfigDict and for the JSON that was made of it.

  Lists become tuples, and a whole number becomes a float where the type is float. A key that is
  absent takes the default of its field, which is what configs meant before the key existed; most
  fields have none.

  Args:
    schema: TrainConfig or VAETrainConfig.
    values: what `to_json` gives, once parsed, or the ConfigDict of a config file.

  Raises:
    UserError: names a key that is unknown, absent or of another type. Ranges are checked by
      checks.py.
  """
  if isinstance(values, ConfigDict):
    values = values.to_dict()
  return _read_group(schema, values, ROOT)


def to_json(config: Any) -> str:
  """The config as JSON on one line, byte for byte what `ConfigDict.to_json` gives for configs/."""
  return json.dumps(to_dict(config))


def to_dict(config: Any) -> dict[str, Any]:
  """The config as nested dictionaries, with nothing but its keys."""
  return {entry.name: _plain(getattr(config, entry.name)) for entry in entries(type(config))}


def entries(schema: type) -> list[Entry]:
  """The config keys of a dataclass, in order; its other fields are left out."""
  hints = get_type_hints(schema)
  return [
    Entry(field.name, key, hints[field.name], _default(field))
    for field in dataclasses.fields(schema)
    if (key := key_of(field))
  ]


def _default(field: dataclasses.Field) -> Any:
  """Returns the value of a field that is not given; MISSING if it must be."""
  made = field.default_factory
  return field.default if made is dataclasses.MISSING else made()


def leaves(config: Any, prefix: str = ROOT) -> Iterator[Leaf]:
  """Every key of a config that has a value of its own, in the order of the schema."""
  for entry in entries(type(config)):
    name, value = f"{prefix}.{entry.name}", getattr(config, entry.name)
    if dataclasses.is_dataclass(entry.type):
      yield from leaves(value, name)
    elif group_of(entry.type):
      for chosen, group in value.items():
        yield from leaves(group, f"{name}.{chosen}")
    else:
      yield Leaf(name, entry.key, value)


def group_of(hint: Any) -> type | None:
  """The dataclass that a mapping from chosen names holds; None for all other types."""
  return get_args(hint)[1] if get_origin(hint) is Mapping else None


def _plain(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    return to_dict(value)
  if isinstance(value, Mapping):
    return {name: to_dict(group) for name, group in value.items()}
  return value


def _read_group(schema: type[_Schema], values: Any, name: str) -> _Schema:
  """A dataclass from a mapping that must have its keys and no others."""
  if not isinstance(values, Mapping):
    raise UserError(f"{name} is {values!r}; it must be a group of keys.")
  known = {entry.name: entry for entry in entries(schema)}
  for given in values:
    if given not in known:
      near = difflib.get_close_matches(given, known, 1)
      advice = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(known)}."
      raise UserError(f"No such config key: {name}.{given}\n{advice}")
  found = {}
  for entry in known.values():
    if entry.name in values:
      where = f"{name}.{entry.name}"
      found[entry.name] = _read_value(entry.type, values[entry.name], where, entry.key)
    elif entry.default is dataclasses.MISSING:
      raise UserError(
        f"The config has no key {name}.{entry.name}; it may be of another version.\n"
        "Add the key; configs/base.py has every key of a training."
      )
  return schema(**found)


def _read_value(hint: Any, value: Any, name: str, key: Key) -> Any:
  if isinstance(hint, type) and dataclasses.is_dataclass(hint):
    return _read_group(hint, value, name)
  if group := group_of(hint):
    return _read_named(group, value, name, key)
  try:
    converted = _convert(hint, value)
  except TypeError as error:
    raise UserError(f"{name} is {value!r}; it must {key.form or error}.") from error
  if converted == () and not key.may_be_empty:
    raise UserError(f"{name} is empty; it must {key.form}.")
  return converted


def _read_named(group: type[_Schema], values: Any, name: str, key: Key) -> Mapping[str, _Schema]:
  """Groups by the names that the user chose, in the order of the names."""
  if not isinstance(values, Mapping):
    raise UserError(f"{name} is {values!r}; it must be a group of keys.")
  wanted = {entry.name for entry in entries(group)}
  for chosen, given in values.items():
    if not isinstance(given, Mapping) or not wanted & set(given):
      raise UserError(f"{name}.{chosen} must {key.form}.")
  return MappingProxyType(
    {chosen: _read_group(group, values[chosen], f"{name}.{chosen}") for chosen in sorted(values)}
  )


def _convert(hint: Any, value: Any) -> Any:
  """The value as the type that a field has; TypeError says what it must do to be one."""
  if get_origin(hint) is tuple:
    return _convert_tuple(get_args(hint), value)
  given = type(value)
  if isinstance(hint, UnionType):  # int | float: kept as it was written.
    if given not in get_args(hint):
      raise TypeError(_WANTED[float])
    return value
  if hint is float and given is int:
    return float(value)
  if given is not hint:
    raise TypeError(_WANTED[hint])
  return value


def _convert_tuple(hints: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
  if not isinstance(value, tuple | list):
    raise TypeError("be a tuple")
  if hints[-1] is Ellipsis:
    hints = (hints[0],) * len(value)
  if len(hints) != len(value):
    raise TypeError(f"have {len(hints)} items")
  return tuple(_convert(hint, item) for hint, item in zip(hints, value, strict=True))
