"""Reads and writes PyTorch files by a process of its own, which needs the extra `convert`.

A .pt file is a pickle, so only torch's restricted loader may read it; and the core does not depend
on torch.
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

  Inside the context, a safetensors copy of a .pt file lies beside it.

  Raises:
    UserError: torch is not installed, or the file is damaged or holds more than tensors.
  """
  path = epath.Path(path)
  if path.suffix == ".safetensors":
    yield SafetensorsFiles([path])
    return
  with _scratch(path.parent) as folder:
    copy(path, folder)
    yield SafetensorsFiles(sorted(folder.glob("*.safetensors")))


def copy(path: epath.Path, folder: epath.Path) -> None:
  """Copies the tensors of a .pt file into safetensors files of an empty folder.

  Raises:
    UserError: as `opened`.
  """
  if reason := _failure("read", path, folder):
    raise UserError(f"{path} cannot be read: {reason}")


def write(path: epath.PathLike, container: str, found: Tensors) -> None:
  """Writes a .pt file of {container: tensors}.

  Raises:
    UserError: torch is not installed.
  """
  path = epath.Path(path)
  with _scratch(path.parent) as folder:
    draft = folder / "all.safetensors"
    safetensors_file.write(draft, found)
    if reason := _failure("write", draft, path, container):
      raise UserError(f"{path} cannot be written: {reason}")


@contextlib.contextmanager
def _scratch(beside: epath.Path) -> Iterator[epath.Path]:
  """A temporary folder on the same disk if that is writable: it likely has room for a copy."""
  parent = beside if os.access(beside, os.W_OK) else None
  with tempfile.TemporaryDirectory(dir=parent, prefix=".torch-") as folder:
    yield epath.Path(folder)


def _failure(*arguments: str | epath.Path) -> str:
  """Runs the helper; returns why it failed, or an empty string."""
  command = [sys.executable, "-m", HELPER, *map(str, arguments)]
  result = subprocess.run(command, capture_output=True, text=True)
  if not result.returncode:
    return ""
  return (result.stderr.strip().splitlines() or ["no reason given"])[-1]
