"""Keys that a stored config lacks because they are newer than the version that wrote it.

Each has the value of its field's default, which is what that version did.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, is_dataclass
from typing import Any, NamedTuple

from cogvideox_jax.config.read import ROOT, entries, group_of, to_dict


class Newer(NamedTuple):
  """A key, or a group of keys, that a stored config lacks."""

  path: tuple[str, ...]  # From the config on.
  value: Any  # What holds; of a group, its values by name.

  def __str__(self) -> str:
    name = ".".join((ROOT, *self.path))
    return name if isinstance(self.value, dict) else f"{name}={self.value!r}"


def newer_keys(schema: type, stored: Any) -> list[Newer]:
  """Lists the keys with a default that a stored config lacks, in the order of the schema.

  Args:
    schema: TrainConfig or VAETrainConfig.
    stored: what the JSON of a workdir holds.
  """
  return list(_newer(schema, stored, ()))


def _newer(schema: type, stored: Any, path: tuple[str, ...]) -> Iterator[Newer]:
  if not isinstance(stored, Mapping):  # The reader refuses it.
    return
  for entry in entries(schema):
    here = (*path, entry.name)
    if entry.name not in stored:
      if entry.default is not MISSING:
        value = to_dict(entry.default) if is_dataclass(entry.default) else entry.default
        yield Newer(here, value)
    elif isinstance(entry.type, type) and is_dataclass(entry.type):
      yield from _newer(entry.type, stored[entry.name], here)
    elif (group := group_of(entry.type)) and isinstance(stored[entry.name], Mapping):
      for name, values in stored[entry.name].items():
        yield from _newer(group, values, (*here, name))


def with_values(fields: dict[str, Any], newer: Iterable[Newer]) -> dict[str, Any]:
  """Returns the nested dictionaries of a config in which these keys have these values."""
  changed = dict(fields)
  for (first, *rest), value in newer:
    if not rest:
      changed[first] = value
    elif isinstance(changed.get(first), Mapping):
      changed[first] = with_values(dict(changed[first]), [Newer(tuple(rest), value)])
  return changed


def without(fields: dict[str, Any], newer: Iterable[Newer]) -> dict[str, Any]:
  """Returns the nested dictionaries of a config that lacks these keys."""
  left_out = dict[str, list[Newer]]()
  for (first, *rest), value in newer:
    left_out.setdefault(first, []).extend([Newer(tuple(rest), value)] if rest else [])
  return {
    name: without(value, left_out[name]) if left_out.get(name) else value
    for name, value in fields.items()
    if name not in left_out or left_out[name]
  }


def describe(where: Any, newer: Iterable[Newer]) -> str:
  """Returns a line that says which keys a stored config lacks, and what holds for them.

  Args:
    where: the file or folder of the config.
  """
  return (
    f"{where} is of an earlier version, which had no {', '.join(map(str, newer))}: it goes on with "
    "what that version did."
  )
