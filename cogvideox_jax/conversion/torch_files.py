"""PyTorch's files, read and written by a process of its own (the extra `convert`).

A .pt file is a pickle: what it holds is read by torch's restricted loader alone, and torch is no
part of the core.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from etils import epath

from cogvideox_jax.conversion import safetensors_file
from cogvideox_jax.conversion.safetensors_file import SafetensorsFiles
from cogvideox_jax.conversion.tensors import Tensors
from cogvideox_jax.errors import UserError

HELPER = "cogvideox_jax.conversion.torch_file"


@contextlib.contextmanager
def opened(path: epath.PathLike) -> Iterator[SafetensorsFiles]:
  """The tensors of a .pt or safetensors file.

  Those of a .pt file are copied beside it for the while.

  Raises:
    UserError: torch is not there, or the file is damaged or holds more than tensors.
  """
  path = epath.Path(path)
  if path.suffix == ".safetensors":
    yield SafetensorsFiles([path])
    return
  with _scratch(path.parent) as folder:
    if reason := _failure("read", path, folder):
      raise UserError(f"{path} cannot be read: {reason}")
    yield SafetensorsFiles(sorted(folder.glob("*.safetensors")))


def write(path: epath.PathLike, container: str, found: Tensors) -> None:
  """Writes a .pt file of {container: tensors}.

  Raises:
    UserError: torch is not there.
  """
  path = epath.Path(path)
  with _scratch(path.parent) as folder:
    draft = folder / "all.safetensors"
    safetensors_file.write(draft, found)
    if reason := _failure("write", draft, path, container):
      raise UserError(f"{path} cannot be written: {reason}")


@contextlib.contextmanager
def _scratch(beside: epath.Path) -> Iterator[epath.Path]:
  """A folder on the same disk, which is likely to have room for a second copy."""
  place = beside if os.access(beside, os.W_OK) else None
  with tempfile.TemporaryDirectory(dir=place, prefix=".torch-") as folder:
    yield epath.Path(folder)


def _failure(*arguments: str | epath.Path) -> str:
  """Runs the helper; returns why it failed, or nothing."""
  command = [sys.executable, "-m", HELPER, *map(str, arguments)]
  result = subprocess.run(command, capture_output=True, text=True)
  if not result.returncode:
    return ""
  return (result.stderr.strip().splitlines() or ["no reason given"])[-1]
