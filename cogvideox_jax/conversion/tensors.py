"""A model's parameters <-> the named tensors of a file, by one of the tables in names.py.

Tensors are taken from a mapping and handed out by an iterator, one at a time, so that neither
direction holds a second copy of a model.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from cogvideox_jax.conversion.names import Row
from cogvideox_jax.errors import UserError

Params = dict[Any, Any]  # Nested, as of `nnx.to_pure_dict`; leaves are arrays.
LISTED = 10  # How many tensors an error names.


class Slot(NamedTuple):
  """One tensor of a file, and where in our parameters it lives."""

  name: str
  shape: tuple[int, ...]  # In the file.
  path: str
  layer: int | None  # Of our stacked layers; None when the parameter is not stacked.
  row: Row


@functools.cache
def abstract_params(model: Callable[..., nnx.Module], config) -> Params:
  """The shapes of a model's parameters; allocates nothing. Not to be changed: it is kept."""
  made = nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0)))
  return nnx.to_pure_dict(nnx.state(made, nnx.Param))


def slots(rows: Sequence[Row], params: Params) -> list[Slot]:
  """Every tensor that a file of these parameters (arrays, or their shapes) holds."""
  found = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    found += _slots_of(path_name(path), leaf.shape, rows)
  return found


def read(tensors: Mapping[str, np.ndarray], rows: Sequence[Row], shapes: Params) -> Params:
  """The parameters that `tensors` holds, in the dtypes in which it holds them.

  Args:
    tensors: the file's tensors by their names; each is looked up once.
    rows: the model's table.
    shapes: of the parameters, from `abstract_params`.

  Raises:
    UserError: a tensor is missing, is of another shape than the config says, or is not in the
      table; the error names it.
  """
  by_path = defaultdict(list)
  for slot in slots(rows, shapes):
    by_path[slot.path].append(slot)
  check_names(tensors.keys(), {slot.name for group in by_path.values() for slot in group})

  def leaf(path, shape):
    group = by_path[path_name(path)]
    if group[0].layer is None:
      return np.ascontiguousarray(_fetch(tensors, group[0]))
    first = _fetch(tensors, group[0])
    stacked = np.empty(shape.shape, first.dtype)
    for slot in group:
      array = _fetch(tensors, slot)
      if array.dtype != stacked.dtype:
        raise UserError(f"{slot.name} is {array.dtype}, but {group[0].name} is {stacked.dtype}.")
      stacked[slot.layer] = array
    return stacked

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def write(params: Params, rows: Sequence[Row], shapes: Params) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors of a file of these parameters, each with its name; undoes `read`.

  Raises:
    UserError: a parameter is missing, is none of the model's, or is of another shape than
      `shapes` (from `abstract_params`) says; the error names it.
  """
  arrays = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  expected = {path_name(p): s.shape for p, s in jax.tree_util.tree_leaves_with_path(shapes)}
  check_names(arrays.keys(), expected.keys())
  for path, shape in expected.items():
    check_shape(path, arrays[path].shape, shape)
  for slot in slots(rows, shapes):
    array = arrays[slot.path]
    array = np.asarray(array if slot.layer is None else array[slot.layer])
    yield slot.name, np.ascontiguousarray(slot.row.to_theirs(array))


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
    return [Slot(row.name.format(**parts), theirs, path, None, row)]
  return [
    Slot(row.name.format(layer=layer, **parts), theirs, path, layer, row)
    for layer in range(shape[0])
  ]


def _template(path: str) -> re.Pattern:
  return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path))


def path_name(path) -> str:
  """The parts of a parameter's path, joined by "/"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _fetch(tensors: Mapping[str, np.ndarray], slot: Slot) -> np.ndarray:
  tensor = tensors[slot.name]
  check_shape(slot.name, tensor.shape, slot.shape)
  return slot.row.to_ours(tensor)


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
