"""Converts a model's parameters to the named tensors of a file, and back, by a table of names.py.

Both sides are lazy: a tensor, or one layer of a parameter, is read from disk when it is indexed and
is not kept. So a conversion between any two kinds of files holds one layer in memory. `materialize`
makes arrays of lazy parameters.
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
from cogvideox_jax.types import Params

# The index of a layer in a parameter that stacks layers, or `...` for all of another parameter.
Layer = int | EllipsisType
LISTED = 10  # The most tensors that an error names.


class Spec(NamedTuple):
  """The dtype and shape of a tensor, known before it is read."""

  dtype: np.dtype
  shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    """The size of the tensor's data in bytes."""
    return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


class Tensors(Mapping[str, np.ndarray]):
  """The tensors of a file by name. A tensor is read whenever it is looked up."""

  @abc.abstractmethod
  def spec(self, name: str) -> Spec:
    """The dtype and shape of a tensor; raises KeyError if the file has none of that name."""


class InMemory(Tensors):
  """Arrays in memory by name, used like a file that holds them."""

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
  """A parameter that is read whenever it is indexed by one of `layers`."""

  shape: tuple[int, ...]
  dtype: np.dtype
  layers: Sequence[Layer]  # Together they are the whole parameter.

  @abc.abstractmethod
  def __getitem__(self, layer: Layer) -> np.ndarray:
    """The array of one layer, or of a parameter that stacks no layers."""


def materialize(params: Params, allocate: Callable[..., np.ndarray] = np.empty) -> Params:
  """Reads the lazy parameters into arrays that `allocate(shape, dtype)` makes."""
  return jax.tree.map(functools.partial(whole, allocate=allocate), params)


def whole(leaf: Any, allocate: Callable[..., np.ndarray] = np.empty) -> Any:
  """The array of one parameter, lazy or not; see `materialize`."""
  if not isinstance(leaf, Lazy):
    return leaf
  array = allocate(leaf.shape, leaf.dtype)
  for layer in leaf.layers:
    array[layer] = leaf[layer]
  return array


class Slot(NamedTuple):
  """A tensor of a file, and the parameter (or the layer of one) that it holds."""

  name: str  # Name in the file.
  shape: tuple[int, ...]  # Shape in the file.
  path: str  # Path of the parameter.
  layer: Layer
  row: Row


def abstract_params(model: Callable[..., nnx.Module], config) -> Params:
  """The shapes and dtypes of a model's parameters; allocates nothing.

  The caller must not change the result, because it is cached.
  """
  return graphs.abstract(model, config)[1]


def slots(rows: Sequence[Row], params: Params) -> list[Slot]:
  """The tensors that a file of these parameters holds.

  params: arrays, or their shapes.
  """
  return [
    slot for path, leaf in flatten(params).items() for slot in _slots_of(path, leaf.shape, rows)
  ]


def read(tensors: Tensors, rows: Sequence[Row], shapes: Params) -> Params:
  """The lazy parameters that `tensors` holds, in the dtypes of the tensors.

  Args:
    rows: the model's table.
    shapes: the shapes of the parameters, from `abstract_params`.

  Raises:
    UserError: a tensor is missing, has another shape than the config implies, or is not in the
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
    return _FromFile(shape.shape, first.dtype, [slot.layer for slot in group], tensors, group)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class _FromFile(Lazy):
  """A parameter that one tensor of a file holds, or one tensor for each layer."""

  shape: tuple[int, ...]
  dtype: np.dtype
  layers: Sequence[Layer]
  tensors: Tensors
  slots: Sequence[Slot]

  def __getitem__(self, layer: Layer) -> np.ndarray:
    slot = self.slots[0 if layer is ... else layer]
    return slot.row.to_ours(self.tensors[slot.name])


class AsFile(Tensors):
  """The tensors of a file that holds these parameters. Undoes `read`."""

  def __init__(self, params: Params, rows: Sequence[Row], shapes: Params):
    """Checks the parameters.

    shapes: the shapes of the model's parameters, from `abstract_params`.

    Raises:
      UserError: a parameter is missing, is not one of the model's, or has another shape than in
        `shapes`; the error names it.
    """
    self._arrays = flatten(params)
    check_params(self._arrays, flatten(shapes))
    self._slots = {slot.name: slot for slot in slots(rows, shapes)}

  def spec(self, name: str) -> Spec:
    slot = self._slots[name]
    return Spec(np.dtype(self._arrays[slot.path].dtype), slot.shape)

  def __getitem__(self, name: str) -> np.ndarray:
    slot = self._slots[name]
    array = np.asarray(self._arrays[slot.path][slot.layer])
    return np.ascontiguousarray(slot.row.to_theirs(array))

  def __iter__(self) -> Iterator[str]:
    return iter(self._slots)

  def __len__(self) -> int:
    return len(self._slots)


def flatten(tree: Any) -> dict[str, Any]:
  """The leaves of a tree (parameters, a train state) by path; see `sharding.path_name`."""
  return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _slots_of(path: str, shape: tuple[int, ...], rows: Sequence[Row]) -> list[Slot]:
  """The tensors of one parameter: one, or one for each layer that it stacks."""
  matches = [(row, match) for row in rows if (match := _template(row.path).fullmatch(path))]
  if len(matches) != 1:
    raise ValueError(f"{path} must match one row of its table in names.py, not {len(matches)}")
  row, match = matches[0]
  fields = match.groupdict()
  stacked = "{layer}" in row.name
  one = np.broadcast_to(
    np.uint8(0), shape[1:] if stacked else shape
  )  # A view, which takes no memory.
  theirs = row.to_theirs(one).shape
  if not stacked:
    return [Slot(row.name.format(**fields), theirs, path, ..., row)]
  return [
    Slot(row.name.format(layer=layer, **fields), theirs, path, layer, row)
    for layer in range(shape[0])
  ]


@functools.cache
def _template(path: str) -> re.Pattern:
  """The pattern of a row's path; each of its fields matches one key."""
  return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path))


def check_params(found: Mapping[str, Any], expected: Mapping[str, Any]):
  """Checks parameters by path against the shapes of a model's.

  Raises:
    UserError: a parameter is missing, not known or of another shape; the error names it.
  """
  check_names(found.keys(), expected.keys())
  for path, leaf in expected.items():
    check_shape(path, found[path].shape, leaf.shape)


def check_shape(name: str, shape: Sequence[int], expected: Sequence[int]):
  """Raises a UserError that names the tensor if its shape is not the one that a model expects."""
  if tuple(shape) != tuple(expected):
    raise UserError(
      f"{name} has shape {list(shape)}; a model of this config has {list(expected)} there.\n"
      "The weights and the config.json beside them are not of the same model."
    )


def check_names(found: Set[str], expected: Set[str]):
  """Raises a UserError that names the first few tensors that are missing or not known."""
  problems = [f"missing: {name}" for name in sorted(expected - found)]
  problems += [f"not known: {name}" for name in sorted(found - expected)]
  if problems:
    more = len(problems) - LISTED
    raise UserError(
      "These weights are not those of a model of this config:\n  "
      + "\n  ".join(problems[:LISTED])
      + (f"\n  and {more} more" if more > 0 else "")
    )
