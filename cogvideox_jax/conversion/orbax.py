"""Writes and reads parameters as Orbax arrays, in FOLDER/orbax beside a component's `config.json`.

The arrays have the paths of our parameters, with layers stacked, so `orbax.checkpoint.v1.load` can
load them onto any mesh. `digests.json` holds their digests, because Orbax restores damaged arrays
without an error, and the version that wrote them. Writing copies no array in memory. Reading uses
TensorStore, the storage library under Orbax, because Orbax can only read whole arrays.
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
from cogvideox_jax.conversion.tensors import Layer, Lazy
from cogvideox_jax.data import digests
from cogvideox_jax.errors import UserError
from cogvideox_jax.sharding import path_name
from cogvideox_jax.types import Params
from cogvideox_jax.version import name_writer

FOLDER = "orbax"  # Subfolder of a component's folder.
CHUNK_BYTES = 2**26  # The most that is read or written at once.
# An array is stored in slices of its first axis (its layers) if a slice has at least this size.
SLICE_BYTES = 2**20
CONCURRENT_BYTES = 2**28
_ARRAYS = "state"  # The subfolder in which Orbax stores the arrays of a checkpoint.


def is_in(folder: epath.Path) -> bool:
  """Whether the weights in a component's folder are Orbax arrays."""
  return (folder / FOLDER).is_dir()


def write_weights(folder: epath.Path, params: Params) -> None:
  """Writes the parameters of a component; lazy ones pass through temporary files in the folder."""
  quieten()
  target = folder / FOLDER
  folder.mkdir(parents=True, exist_ok=True)
  context = ocp.Context()
  context.array.saving.use_ocdbt = False  # A folder for each array, so that slices can be read.
  context.array.saving.scoped_storage_options_creator = _chunks
  context.memory.deepcopy_host_arrays = False
  context.memory.write_concurrent_bytes = CONCURRENT_BYTES
  with _mapped_files(folder) as allocate, context:
    arrays = tensors.materialize(params, allocate)
    ocp.save(target, arrays)
    flat = {path: np.asarray(x) for path, x in tensors.flatten(arrays).items()}
    digests.write(target, digests.describe(flat))


def _chunks(key: Any, value: np.ndarray) -> Any:
  """How the array of a key is split, so that one layer can be read without the others."""
  layers = value.ndim > 1 and value.nbytes >= SLICE_BYTES * value.shape[0]
  options = ocp.options.ArrayOptions.Saving.StorageOptions
  return options(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if layers else None)


@contextmanager
def _mapped_files(beside: epath.Path) -> Iterator[Callable[..., np.ndarray]]:
  """Allocates arrays in temporary memory-mapped files, so that they need not fit in memory."""
  with tempfile.TemporaryDirectory(dir=beside, prefix=".arrays-") as scratch:
    numbers = itertools.count()

    def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
      size = max(1, tensors.Spec(dtype, shape).nbytes)
      buffer = np.memmap(f"{scratch}/{next(numbers)}", np.uint8, "w+", shape=(size,))
      return buffer.view(dtype).reshape(shape)

    yield allocate


def open_weights(component: Component, folder: epath.Path, config: Any) -> Params:
  """The lazy parameters of a component in its folder.

  Raises:
    UserError: the arrays are damaged, or are not those of a model of the config. In the second case
      the error names the version that wrote them, if it is another one.
  """
  try:
    found = open_arrays(folder / FOLDER)
  except digests.UnusableError as error:
    raise UserError(f"{folder / FOLDER} cannot be used: {error}; write it again.") from error
  shapes = component.shapes(config)
  with naming_writer(folder / FOLDER):
    tensors.check_params(found, tensors.flatten(shapes))
  return jax.tree.map_with_path(lambda path, _: found[path_name(path)], shapes)


@contextmanager
def naming_writer(checkpoint: epath.Path) -> Iterator[None]:
  """Adds to a UserError raised inside which version wrote a checkpoint, if it is another one.

  checkpoint: may be missing; then errors stay as they are.
  """
  try:
    yield
  except UserError as error:
    try:
      line = name_writer(digests.version(checkpoint))
    except digests.UnusableError:  # There is no checkpoint, or nothing is known about it.
      line = ""
    if not line:
      raise
    raise UserError(f"{error}\n{line}") from error


def open_arrays(checkpoint: epath.Path) -> dict[str, Lazy]:
  """The arrays of a checkpoint by path, after a check that its files are as they were written.

  Raises:
    UnusableError: a file is missing or damaged; the error names it.
  """
  return stored(checkpoint, digests.read(checkpoint))


def stored(checkpoint: epath.Path, paths: Iterable[str]) -> dict[str, Lazy]:
  """The arrays of a checkpoint by path, without a check of its files."""
  return {path: _Stored(checkpoint / _ARRAYS / path.replace("/", ".")) for path in paths}


class _Stored(Lazy):
  """An array of a checkpoint, which can also be indexed by a tuple of slices."""

  layers = (...,)

  def __init__(self, path: epath.Path):
    location = os.fspath(path)  # A URL if it is in a bucket.
    store = location if "://" in location else {"driver": "file", "path": os.path.abspath(location)}
    spec = {"driver": "zarr3", "kvstore": store}
    self._array = tensorstore.open(spec, read=True).result()
    self.shape, self.dtype = tuple(self._array.shape), self._array.dtype.numpy_dtype

  def __getitem__(self, layer: Layer | tuple[slice, ...]) -> np.ndarray:
    return self._array[layer].read().result()


@functools.cache
def quieten() -> None:
  """Keeps Orbax's log off the terminal, because what matters is also raised as an error.

  If a write fails, Orbax closes its event loop while other writes run. Python then reports each of
  them with a traceback, which this hides too.
  """
  logging.getLogger("absl").addFilter(_not_from_orbax)
  report = sys.unraisablehook

  def report_others(args: Any) -> None:
    if str(args.exc_value) != "Event loop is closed":
      report(args)

  sys.unraisablehook = report_others


def _not_from_orbax(record: logging.LogRecord) -> bool:
  return "orbax" not in record.pathname
