"""Methods whose arguments are defined once, as the fields of a dataclass."""

import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
Owner = TypeVar("Owner")
Arguments = TypeVar("Arguments")
Result = TypeVar("Result")

LINE = 100  # Columns of a docstring's line.


def takes(
  arguments: Callable[P, Arguments],
  convert: Callable[[str, Any], Any] = lambda _, value: value,
) -> Callable[[Callable[[Owner, Arguments], Result]], Callable[Concatenate[Owner, P], Result]]:
  """Makes a method of one dataclass instance callable with the fields of that dataclass.

  Type checkers read names, types and order of the arguments from the dataclass. `inspect.signature`
  and `help` do so at run time: each field's description, the string of its `Annotated` type, is
  added to the method's docstring.

  Args:
    arguments: a dataclass. An argument that it does not have raises a TypeError.
    convert: (name, value) of an argument that is given -> the value that the dataclass takes.
  """

  def decorate(
    method: Callable[[Owner, Arguments], Result],
  ) -> Callable[Concatenate[Owner, P], Result]:
    @functools.wraps(method)
    def call(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> Result:
      bound = inspect.signature(arguments).bind(*args, **kwargs)
      for name, value in bound.arguments.items():
        bound.arguments[name] = convert(name, value)
      return method(self, arguments(*bound.args, **bound.kwargs))

    described: Any = call
    described.__signature__ = _signature(method, arguments)
    described.__doc__ = _docstring(method, arguments)
    return call

  return decorate


def _signature(method: Callable[..., Any], arguments: Any) -> inspect.Signature:
  """The dataclass's fields, after the method's own first parameter."""
  types = typing.get_type_hints(arguments)
  own = inspect.signature(method)
  fields = [
    parameter.replace(annotation=types[name])
    for name, parameter in inspect.signature(arguments).parameters.items()
  ]
  return own.replace(parameters=[next(iter(own.parameters.values())), *fields])


def _docstring(method: Callable[..., Any], arguments: Any) -> str:
  """The method's docstring, with the descriptions of the fields before "Raises"."""
  types = typing.get_type_hints(arguments, include_extras=True)
  args = ["Args:"]
  for field in dataclasses.fields(arguments):
    _, description = typing.get_args(types[field.name])
    line = f"{field.name}: {description}"
    args += textwrap.wrap(line, LINE, initial_indent="  ", subsequent_indent="    ")
  summary, heading, raises = inspect.cleandoc(method.__doc__ or "").partition("Raises:")
  return summary + "\n".join(args) + "\n\n" + heading + raises
