"""Parameters as Orbax arrays, in FOLDER/orbax beside the component's `config.json`.

Arrays lie there by our own paths, layers stacked, so that `orbax.checkpoint.v1.load` puts them onto
any mesh; `digests.json` tells of damage, which Orbax would restore. Written without a copy in
memory, and read by parts through TensorStore, which Orbax keeps its arrays with and cannot read
less of than a whole one.
"""

import functools
import itertools
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import tensorstore
from etils import epath
from orbax.checkpoint import v1 as ocp

from cogvideox_jax.conversion import tensors
from cogvideox_jax.conversion.components import Component
from cogvideox_jax.conversion.tensors import Lazy, Params, Place
from cogvideox_jax.data import digests
from cogvideox_jax.errors import UserError
from cogvideox_jax.sharding import path_name

FOLDER = "orbax"  # In that of a component.
CHUNK_BYTES = 2**26  # The most that is read or written at once.
SLICE_BYTES = 2**20  # Arrays are cut along their first axis, of layers, where this leaves as much.
CONCURRENT_BYTES = 2**28
_ARRAYS = "state"  # Where Orbax puts the arrays of a checkpoint.


def is_in(folder: epath.Path) -> bool:
  """Whether the weights of a component's folder are Orbax arrays."""
  return (folder / FOLDER).is_dir()


def save(folder: epath.Path, params: Params) -> None:
  """Writes a component's parameters, lazy ones by way of files beside them."""
  quieten()
  target = folder / FOLDER
  folder.mkdir(parents=True, exist_ok=True)
  context = ocp.Context()
  context.array.saving.use_ocdbt = False  # A folder for each array, so that parts can be read.
  context.array.saving.scoped_storage_options_creator = _chunks
  context.memory.deepcopy_host_arrays = False
  context.memory.write_concurrent_bytes = CONCURRENT_BYTES
  with _mapped_files(folder) as allocate, context:
    arrays = tensors.materialize(params, allocate)
    ocp.save(target, arrays)
    flat = {path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(arrays)}
    digests.write(target, digests.describe(flat))


def _chunks(key: Any, value: np.ndarray) -> Any:
  """How the array at a key is cut: one layer can then be read without the others."""
  layers = value.ndim > 1 and value.nbytes >= SLICE_BYTES * value.shape[0]
  options = ocp.options.ArrayOptions.Saving.StorageOptions
  return options(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if layers else None)


@contextmanager
def _mapped_files(beside: epath.Path) -> Iterator[Callable[..., np.ndarray]]:
  """Makes arrays that lie in files for the while, which memory need not hold."""
  with tempfile.TemporaryDirectory(dir=beside, prefix=".arrays-") as scratch:
    numbers = itertools.count()

    def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
      size = max(1, tensors.Spec(dtype, shape).nbytes)
      buffer = np.memmap(f"{scratch}/{next(numbers)}", np.uint8, "w+", shape=(size,))
      return buffer.view(dtype).reshape(shape)

    yield allocate


def open_weights(component: Component, folder: epath.Path, config: Any) -> Params:
  """The parameters of a component in a folder, lazy.

  Raises:
    UserError: they are damaged, or not those of a model of the config.
  """
  try:
    found = open_arrays(folder / FOLDER)
  except digests.UnusableError as error:
    raise UserError(f"{folder / FOLDER} cannot be used: {error}; write it again.") from error
  shapes = component.shapes(config)
  tensors.check_params(found, tensors.flatten(shapes))
  return jax.tree.map_with_path(lambda path, _: found[path_name(path)], shapes)


def open_arrays(checkpoint: epath.Path) -> dict[str, Lazy]:
  """Path -> array of a checkpoint, once its files are found to be as they were written.

  Raises:
    UnusableError: names the first file that is not.
  """
  return stored(checkpoint, digests.read(checkpoint))


def stored(checkpoint: epath.Path, paths: Iterable[str]) -> dict[str, Lazy]:
  """Path -> array of a checkpoint, whose files are not looked at first."""
  return {path: _Stored(checkpoint / _ARRAYS / path.replace("/", ".")) for path in paths}


class _Stored(Lazy):
  """An array of a checkpoint."""

  places = (...,)

  def __init__(self, path: epath.Path):
    place = os.fspath(path)  # Of a bucket, a URL.
    store = place if "://" in place else {"driver": "file", "path": os.path.abspath(place)}
    spec = {"driver": "zarr3", "kvstore": store}
    self._array = tensorstore.open(spec, read=True).result()
    self.shape, self.dtype = tuple(self._array.shape), self._array.dtype.numpy_dtype

  def __getitem__(self, place: Place | tuple[slice, ...]) -> np.ndarray:
    return self._array[place].read().result()


@functools.cache
def quieten() -> None:
  """Keeps Orbax's log off the terminal: what matters is raised too, and said in our words.

  When one of its writes fails it closes its event loop under the others, which Python reports,
  each with a traceback.
  """
  logging.getLogger("absl").addFilter(_not_from_orbax)
  report = sys.unraisablehook

  def report_others(args: Any) -> None:
    if str(args.exc_value) != "Event loop is closed":
      report(args)

  sys.unraisablehook = report_others


def _not_from_orbax(record: logging.LogRecord) -> bool:
  return "orbax" not in record.pathname
