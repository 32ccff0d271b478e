"""A model's parameters <-> the named tensors of a file, by one of the tables in names.py.

Both sides are views: a tensor, or one layer of a parameter, is read from disk when it is asked for
and not kept. So a model passes from any kind of file to any other with no more of it in memory than
one layer; `materialize` makes arrays of a view.
"""

import abc
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from types import EllipsisType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from cogvideox_jax.conversion.names import Row
from cogvideox_jax.errors import UserError
from cogvideox_jax.models import graphs
from cogvideox_jax.sharding import path_name

Params = dict[Any, Any]  # Nested, as of `nnx.to_pure_dict`; leaves are arrays, or `Lazy`.
Place = int | EllipsisType  # A layer of a parameter that stacks them, or all of another one.
LISTED = 10  # How many tensors an error names.


class Spec(NamedTuple):
  """What is known of a tensor before it is read."""

  dtype: np.dtype
  shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


class Tensors(Mapping[str, np.ndarray]):
  """The tensors of a file by their names, each read when it is looked up."""

  @abc.abstractmethod
  def spec(self, name: str) -> Spec:
    """KeyError if there is no such tensor."""


class InMemory(Tensors):
  """Arrays by their names, as a file that holds them would be."""

  def __init__(self, arrays: Mapping[str, np.ndarray]):
    self._arrays = arrays

  def spec(self, name: str) -> Spec:
    return Spec(self._arrays[name].dtype, self._arrays[name].shape)

  def __getitem__(self, name: str) -> np.ndarray:
    return self._arrays[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._arrays)

  def __len__(self) -> int:
    return len(self._arrays)


class Lazy(abc.ABC):
  """A parameter that is read when it is indexed, as an array: by a layer if it stacks them."""

  shape: tuple[int, ...]
  dtype: np.dtype
  places: Sequence[Place]  # What it is best read by; all together are the whole.

  @abc.abstractmethod
  def __getitem__(self, place: Place) -> np.ndarray: ...


def materialize(params: Params, allocate: Callable[..., np.ndarray] = np.empty) -> Params:
  """The parameters with an array for each that is lazy, made by `allocate(shape, dtype)`."""
  return jax.tree.map(functools.partial(whole, allocate=allocate), params)


def whole(leaf: Any, allocate: Callable[..., np.ndarray] = np.empty) -> Any:
  """One parameter, as `materialize` makes it."""
  if not isinstance(leaf, Lazy):
    return leaf
  array = allocate(leaf.shape, leaf.dtype)
  for place in leaf.places:
    array[place] = leaf[place]
  return array


class Slot(NamedTuple):
  """One tensor of a file, and where in our parameters it lives."""

  name: str
  shape: tuple[int, ...]  # In the file.
  path: str
  place: Place
  row: Row


def abstract_params(model: Callable[..., nnx.Module], config) -> Params:
  """The shapes of a model's parameters; allocates nothing. Not to be changed: it is kept."""
  return graphs.abstract(model, config)[1]


def slots(rows: Sequence[Row], params: Params) -> list[Slot]:
  """Every tensor that a file of these parameters (arrays, or their shapes) holds."""
  return [
    slot for path, leaf in flatten(params).items() for slot in _slots_of(path, leaf.shape, rows)
  ]


def read(tensors: Tensors, rows: Sequence[Row], shapes: Params) -> Params:
  """The parameters that `tensors` holds, lazy, in the dtypes in which it holds them.

  Args:
    rows: the model's table.
    shapes: of the parameters, from `abstract_params`.

  Raises:
    UserError: a tensor is missing, is of another shape than the config says, or is not in the
      table; the error names it.
  """
  groups = {path: _slots_of(path, leaf.shape, rows) for path, leaf in flatten(shapes).items()}
  check_names(tensors.keys(), {slot.name for group in groups.values() for slot in group})

  def leaf(path, shape):
    group = groups[path_name(path)]
    first = tensors.spec(group[0].name)
    for slot in group:
      spec = tensors.spec(slot.name)
      check_shape(slot.name, spec.shape, slot.shape)
      if spec.dtype != first.dtype:
        raise UserError(f"{slot.name} is {spec.dtype}, but {group[0].name} is {first.dtype}.")
    return _FromFile(shape.shape, first.dtype, [slot.place for slot in group], tensors, group)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class _FromFile(Lazy):
  shape: tuple[int, ...]
  dtype: np.dtype
  places: Sequence[Place]
  tensors: Tensors
  slots: Sequence[Slot]

  def __getitem__(self, place: Place) -> np.ndarray:
    slot = self.slots[0 if place is ... else place]
    return slot.row.to_ours(self.tensors[slot.name])


class AsFile(Tensors):
  """The tensors of a file of these parameters; undoes `read`."""

  def __init__(self, params: Params, rows: Sequence[Row], shapes: Params):
    """shapes: from `abstract_params`.

    Raises:
      UserError: a parameter is missing, is none of the model's, or is of another shape than
        `shapes` says; the error names it.
    """
    self._arrays = flatten(params)
    check_params(self._arrays, flatten(shapes))
    self._slots = {slot.name: slot for slot in slots(rows, shapes)}

  def spec(self, name: str) -> Spec:
    slot = self._slots[name]
    return Spec(np.dtype(self._arrays[slot.path].dtype), slot.shape)

  def __getitem__(self, name: str) -> np.ndarray:
    slot = self._slots[name]
    array = np.asarray(self._arrays[slot.path][slot.place])
    return np.ascontiguousarray(slot.row.to_theirs(array))

  def __iter__(self) -> Iterator[str]:
    return iter(self._slots)

  def __len__(self) -> int:
    return len(self._slots)


def flatten(params: Params) -> dict[str, Any]:
  """Path -> leaf."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _slots_of(path: str, shape: tuple[int, ...], rows: Sequence[Row]) -> list[Slot]:
  matches = [(row, match) for row in rows if (match := _template(row.path).fullmatch(path))]
  if len(matches) != 1:
    raise ValueError(f"{path} must match one row of its table in names.py, not {len(matches)}")
  row, match = matches[0]
  parts = match.groupdict()
  stacked = "{layer}" in row.name
  one = np.broadcast_to(np.uint8(0), shape[1:] if stacked else shape)  # Takes no memory.
  theirs = row.to_theirs(one).shape
  if not stacked:
    return [Slot(row.name.format(**parts), theirs, path, ..., row)]
  return [
    Slot(row.name.format(layer=layer, **parts), theirs, path, layer, row)
    for layer in range(shape[0])
  ]


@functools.cache
def _template(path: str) -> re.Pattern:
  return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path))


def check_params(found: Mapping[str, Any], expected: Mapping[str, Any]):
  """Raises UserError, naming it, if a parameter (by path) is missing, unknown or misshapen."""
  check_names(found.keys(), expected.keys())
  for path, leaf in expected.items():
    check_shape(path, found[path].shape, leaf.shape)


def check_shape(name: str, shape: Sequence[int], expected: Sequence[int]):
  """Raises UserError, naming the tensor, if a shape is not the one that a model has there."""
  if tuple(shape) != tuple(expected):
    raise UserError(
      f"{name} has shape {list(shape)}; a model of this config has {list(expected)} there.\n"
      "The weights and the config.json beside them are not of the same model."
    )


def check_names(found: Set[str], expected: Set[str]):
  """Raises UserError, naming the first of them, if tensors are missing or not known."""
  problems = [f"missing: {name}" for name in sorted(expected - found)]
  problems += [f"not known: {name}" for name in sorted(found - expected)]
  if problems:
    more = len(problems) - LISTED
    raise UserError(
      "These weights are not those of a model of this config:\n  "
      + "\n  ".join(problems[:LISTED])
      + (f"\n  and {more} more" if more > 0 else "")
    )
