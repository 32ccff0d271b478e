"""Reads and writes safetensors files one tensor at a time.

The library's writer needs all tensors of a file in memory, and copies them. The format is a JSON
header followed by the tensors, so our writer holds one tensor at a time.
"""

import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

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
# Types that numpy's reader lacks. They are read as bfloat16, which holds each of their numbers.
_EIGHT_BITS = {
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
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
      file = _File(path)
      self.metadata.update(file.metadata)
      self._files.update({name: (file, name) for name in file.names})
    for alias, name in (aliases or {}).items():
      if alias in self._files:
        self._files.setdefault(name, self._files[alias])
        del self._files[alias]

  def spec(self, name: str) -> Spec:
    file, stored = self._files[name]
    return file.spec(stored)

  def is_eight_bits(self, name: str) -> bool:
    """Whether a tensor is stored as floats of eight bits."""
    file, stored = self._files[name]
    return file.code(stored) in _EIGHT_BITS

  def __getitem__(self, name: str) -> np.ndarray:
    file, stored = self._files[name]
    return file.read(stored)

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)


class _File:
  """One file."""

  def __init__(self, path: epath.PathLike):
    """Opens it; raises UserError if it is damaged."""
    self._path = os.fspath(path)
    try:
      self._file = safe_open(self._path, framework="np")
    except SafetensorError as error:
      raise UserError(f"{path} is damaged or incomplete ({error}); fetch it again.") from error
    self.names: list[str] = self._file.keys()
    self.metadata: dict[str, str] = self._file.metadata() or {}

  def code(self, name: str) -> str:
    """The format's name for the dtype of a tensor."""
    return self._file.get_slice(name).get_dtype()

  def spec(self, name: str) -> Spec:
    """The dtype in which a tensor is read, and its shape."""
    tensor = self._file.get_slice(name)
    code = "BF16" if tensor.get_dtype() in _EIGHT_BITS else tensor.get_dtype()
    if code not in DTYPES:
      known = ", ".join([*DTYPES, *_EIGHT_BITS])
      raise UserError(f"{self._path}: {name} is {code}; only {known} are supported.")
    return Spec(DTYPES[code], tuple(tensor.get_shape()))

  def read(self, name: str) -> np.ndarray:
    spec, code = self.spec(name), self._file.get_slice(name).get_dtype()
    if code not in _EIGHT_BITS:
      return self._file.get_tensor(name)
    length, entries = self._header
    offset, _ = entries[name]["data_offsets"]
    count = int(np.prod(spec.shape))
    found = np.fromfile(self._path, _EIGHT_BITS[code], count, offset=8 + length + offset)
    return found.reshape(spec.shape).astype(spec.dtype)

  @functools.cached_property
  def _header(self) -> tuple[int, dict[str, Any]]:
    """The length of the header in bytes, and its entries by tensor."""
    with open(self._path, "rb") as file:
      length = int.from_bytes(file.read(8), "little")
      return length, json.loads(file.read(length))


def plain_name(name: Any, index: epath.PathLike) -> str:
  """Returns the name of a file that an index lists, if it is one beside the index.

  Raises:
    UserError: it is no name, or one that leads out of the index's folder.
  """
  if not isinstance(name, str) or not name or "/" in name or "\\" in name or name in (".", ".."):
    raise UserError(
      f"{index} names {str(name)[:100]!r}, which is no file beside it.\n"
      "Do not use this model: an index that leads out of its folder is damaged or malicious."
    )
  return name


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
