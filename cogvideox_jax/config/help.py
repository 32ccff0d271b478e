"""Describes every key of a config in plain text: what `--help_config` prints."""

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin

from cogvideox_jax.config.read import ROOT, Entry, entries, group_of

WIDTH = 100
INDENT = 4 * " "
ANY_NAME = "NAME"  # Stands for a name that users choose, where the config has none.


class Group(NamedTuple):
  """Keys of one dataclass in a config."""

  name: str  # Dotted.
  values: Any  # The dataclass; None for a group that the config could have.


def describe(config: Any) -> str:
  """Every key with its value, type, range, meaning and source.

  Keys of groups that users name, such as stages, are described once, below the value that each
  group has.

  Args:
    config: a TrainConfig or VAETrainConfig.
  """
  return "\n".join(_describe(type(config), [Group(ROOT, config)]))


def _describe(schema: type, groups: Sequence[Group]) -> Iterator[str]:
  for entry in entries(schema):
    held = [
      Group(f"{name}.{entry.name}", None if values is None else getattr(values, entry.name))
      for name, values in groups
    ]
    if chosen := group_of(entry.type):
      yield from _heading(held, entry)
      yield from _describe(chosen, _named(held))
    elif isinstance(entry.type, type) and dataclasses.is_dataclass(entry.type):
      yield from _heading(held, entry)
      yield from _describe(entry.type, held)
    else:
      for name, value in held:
        yield name if value is None else f"{name} = {value!r}"
      yield from _indented(f"{_type_text(entry.type)}, {_range_text(entry)}. {entry.key.meaning}")
      yield from _indented(f"Source: {entry.key.source}.")


def _heading(groups: Sequence[Group], entry: Entry) -> Iterator[str]:
  yield f"\n{', '.join(group.name for group in groups)}: {entry.key.meaning}"


def _named(mappings: Sequence[Group]) -> list[Group]:
  """The groups by the names that the user chose, or one with a placeholder."""
  found = [
    Group(f"{mapping.name}.{name}", values)
    for mapping in mappings
    for name, values in mapping.values.items()
  ]
  return found or [Group(f"{mapping.name}.{ANY_NAME}", None) for mapping in mappings]


def _type_text(hint: Any) -> str:
  """A field's type in words, such as `tuple of (int, int)`."""
  if isinstance(hint, UnionType):
    return " or ".join(map(_type_text, get_args(hint)))
  if get_origin(hint) is not tuple:
    return hint.__name__
  items = [_type_text(item) for item in get_args(hint) if item is not Ellipsis]
  return f"tuple of {items[0]}" if Ellipsis in get_args(hint) else f"({', '.join(items)})"


def _range_text(entry: Entry) -> str:
  """Which values a key may have."""
  words = _type_text(entry.type)
  if entry.key.choices:
    return f"one of {', '.join(entry.key.choices)}"
  if "bool" in words:
    return "True or False"
  return "any text" if "str" in words else entry.key.allowed.wanted


def _indented(text: str) -> list[str]:
  return textwrap.wrap(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
