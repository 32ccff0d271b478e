"""Flags that take a path: their values are absolute, whatever folder the command runs in."""

from collections.abc import Collection
from typing import Any

from absl import flags

from cogvideox_jax import paths
from cogvideox_jax.errors import UserError


def define(
  name: str,
  default: str | None,
  text: str,
  *,
  required: bool = False,
  names: Collection[str] = (),
  may_be_empty: bool = False,
) -> flags.FlagHolder[Any]:
  """Defines a flag of the module that calls, as `flags.DEFINE_string` does.

  Args:
    text: what `--help` says.
    names: values that are names and no paths, such as those of shipped models.
    may_be_empty: whether an empty value means something.
  """
  parser = _PathParser(frozenset(names), may_be_empty)
  flag = _PathFlag(parser, flags.ArgumentSerializer(), name, default, text)
  return flags.DEFINE_flag(flag, required=required)


def as_given(holder: flags.FlagHolder[Any]) -> str | None:
  """Returns the value as it stands on the command line; else the flag's."""
  flag = flags.FLAGS[holder.name]
  assert isinstance(flag, _PathFlag)
  return flag.value if flag.given is None else flag.given


class _PathFlag(flags.Flag):
  given: str | None = None  # As on the command line.

  def parse(self, argument: str) -> None:
    super().parse(argument)
    self.given = argument


class _PathParser(flags.ArgumentParser):
  def __init__(self, names: Collection[str], may_be_empty: bool):
    super().__init__()
    self._names, self._may_be_empty = names, may_be_empty

  def parse(self, argument: str) -> str:
    if argument in self._names or (self._may_be_empty and not argument):
      return argument
    try:
      return paths.absolute(argument)
    except UserError as error:
      raise ValueError(str(error)) from error

  def flag_type(self) -> str:
    return "a path"


flags.disclaim_key_flags()
