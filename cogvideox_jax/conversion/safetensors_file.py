"""Reads and writes safetensors files one tensor at a time.

The library's writer needs all tensors of a file in memory, and copies them. The format is a JSON
header followed by the tensors, so our writer holds one tensor at a time.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from cogvideox_jax.conversion.tensors import Spec, Tensors
from cogvideox_jax.errors import UserError

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNMENT = 8  # Bytes; the first tensor starts at a multiple.


class SafetensorsFiles(Tensors):
  """The tensors of one or several files."""

  def __init__(self, paths: Iterable[epath.PathLike], aliases: Mapping[str, str] | None = None):
    """Opens the files.

    aliases: name of a tensor in a file -> the name under which it is looked up instead.

    Raises:
      UserError: a file is damaged.
    """
    self._files = {}
    self.metadata: dict[str, str] = {}  # The entries of all headers.
    for path in paths:
      file = _open(path)
      self.metadata.update(file.metadata() or {})
      stored = file.keys()
      self._files.update({name: (file, name) for name in stored})
    for alias, name in (aliases or {}).items():
      if alias in self._files:
        self._files.setdefault(name, self._files[alias])
        del self._files[alias]

  def spec(self, name: str) -> Spec:
    file, stored = self._files[name]
    tensor = file.get_slice(stored)
    if tensor.get_dtype() not in DTYPES:
      raise UserError(f"{name} is {tensor.get_dtype()}; only {', '.join(DTYPES)} are supported.")
    return Spec(DTYPES[tensor.get_dtype()], tuple(tensor.get_shape()))

  def __getitem__(self, name: str) -> np.ndarray:
    file, stored = self._files[name]
    return file.get_tensor(stored)

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)


def _open(path: epath.PathLike):
  try:
    return safe_open(os.fspath(path), framework="np")
  except SafetensorError as error:
    raise UserError(f"{path} is damaged or incomplete ({error}); fetch it again.") from error


def header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
  """The header of a file with these tensors, in this order."""
  entries: dict[str, object] = {"__metadata__": dict(metadata)}
  start = 0
  for name, spec in specs.items():
    end = start + spec.nbytes
    entries[name] = {
      "dtype": CODES[spec.dtype],
      "shape": list(spec.shape),
      "data_offsets": [start, end],
    }
    start = end
  text = json.dumps(entries, separators=(",", ":")).encode()
  text += b" " * (-len(text) % ALIGNMENT)
  return len(text).to_bytes(8, "little") + text


def write(path: epath.Path, tensors: Tensors, names: Iterable[str] | None = None) -> None:
  """Writes a file of all the tensors, or of those named, with one at a time in memory."""
  specs = {name: tensors.spec(name) for name in (tensors if names is None else names)}
  with path.open("wb") as file:
    file.write(header(specs, {"format": "pt"}))
    for name, spec in specs.items():
      array = np.ascontiguousarray(tensors[name])
      if (array.dtype, array.shape) != (spec.dtype, spec.shape):
        raise ValueError(f"{name} is {array.dtype}{array.shape}, but was to be {spec}")
      file.write(array.reshape(-1).view(np.uint8).data)
