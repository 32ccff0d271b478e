"""Describes a config key beside the dataclass field that holds its value.

`field(metadata=key(...))` marks a dataclass field as a config key. `config/` reads the marks: they
are the documentation that `--help_config` prints and the ranges that `config/checks.py` enforces.
A field without such a mark is not a config key.
"""

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass
from math import inf, isfinite


@dataclass(frozen=True)
class Range:
  """The numbers that a key may have."""

  wanted: str  # Completes the sentence "it must be ...".
  contains: Callable[[float], bool]


ABOVE_ZERO = Range("above 0", lambda number: 0 < number < inf)
AT_LEAST_ZERO = Range("at least 0", lambda number: 0 <= number < inf)
SEED = Range("from 0 to 4294967295", lambda number: 0 <= number < 2**32)
FRACTION = Range("from 0 to 1", lambda number: 0 <= number <= 1)
FINITE = Range("finite", isfinite)


@dataclass(frozen=True)
class Key:
  """What is known of a config key besides its type and its value."""

  meaning: str  # Sentences, with the unit.
  source: str  # Where the value of configs/base.py or configs/vae_tiny.py comes from.
  allowed: Range  # Where a number, or each number in a tuple, must be.
  choices: tuple[str, ...]  # The values that a string may have; empty if it may be any.
  form: str  # Completes "it must ..." for a tuple, or a group of keys that users name.
  may_be_empty: bool  # Whether a tuple may have no items.
  is_path: bool  # Whether its texts are paths, or empty.
  names: tuple[str, ...]  # Texts that are names and no paths.


_MARK = "config_key"


def key(
  meaning: str,
  source: str = "ours",
  *,
  allowed: Range = ABOVE_ZERO,
  choices: tuple[str, ...] = (),
  form: str = "",
  may_be_empty: bool = False,
  is_path: bool = False,
  names: tuple[str, ...] = (),
) -> Mapping[str, Key]:
  """The metadata of a dataclass field that is a config key, or a group of keys."""
  return {_MARK: Key(meaning, source, allowed, choices, form, may_be_empty, is_path, names)}


def key_of(field: Field) -> Key | None:
  """The description of a field; None if the field is not a config key."""
  return field.metadata.get(_MARK)
