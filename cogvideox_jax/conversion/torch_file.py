"""Copies the tensors of a PyTorch file to safetensors, or back.

python -m cogvideox_jax.conversion.torch_file read FILE.pt FOLDER
python -m cogvideox_jax.conversion.torch_file write FILE.safetensors FILE.pt CONTAINER

Needs the extra `convert`. torch's restricted loader builds nothing but tensors from the pickle.
`torch_files` runs this as a process of its own, so that its memory is freed at the end.
"""

import importlib
import json
import pickle
import re
import sys
import zipfile
from pathlib import Path

import numpy as np

try:
  import torch  # pyright: ignore[reportMissingImports] - in the extra, not installed for linting.
  from safetensors.torch import save_file
except ImportError as error:
  raise SystemExit("PyTorch is needed for it: pip install -e '.[convert]'") from error

CONTAINERS = ("model", "module", "state_dict")  # Keys under which a file may keep its tensors.
MAX_BYTES = 2**29  # The size of a written file, which is in memory twice.
TYPES = {
  "F64": torch.float64,
  "F32": torch.float32,
  "F16": torch.float16,
  "BF16": torch.bfloat16,
  "I64": torch.int64,
  "I32": torch.int32,
}


_MULTIARRAY = importlib.import_module("numpy._core.multiarray")
# What rebuilds numpy's arrays and numbers, such as the states of random generators that trainers
# keep beside the weights. Each makes an array or a number of data, and runs nothing. The second
# name is that of numpy 1.
NUMPY = [
  (np.ndarray, "numpy.ndarray"),
  (np.dtype, "numpy.dtype"),
  *((function, f"{module}.multiarray.{function.__name__}")
    for module in ("numpy._core", "numpy.core")
    for function in (_MULTIARRAY._reconstruct, _MULTIARRAY.scalar)),
  *((type(np.dtype(code)), f"numpy.dtypes.{type(np.dtype(code)).__name__}")
    for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"),
]  # fmt: skip


def load(source: Path):
  """What a .pt file holds, by torch's restricted loader; files of before torch 1.6, too."""
  if zipfile.is_zipfile(source):
    _check_stored(source)
  try:
    with torch.serialization.safe_globals(NUMPY):
      return torch.load(
        source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source)
      )
  except pickle.UnpicklingError as error:
    kind = re.search(r"GLOBAL (\S+)|Unsupported class (\S+)", str(error))
    if kind is None:
      raise SystemExit("it is damaged or no file of torch's") from error
    raise SystemExit(
      f"it holds an object, {kind[1] or kind[2]}, that is no tensor, and building it "
      "could run code. Save the tensors alone: torch.save(model.state_dict(), FILE)"
    ) from error
  except (RuntimeError, EOFError, KeyError) as error:
    reason = (str(error).splitlines() or ["the file ends too early"])[0]
    raise SystemExit(f"it is damaged or no file of torch's ({reason})") from error


def _check_stored(source: Path) -> None:
  """Refuses a zip archive with compressed entries, which may unpack to more than memory holds."""
  try:
    with zipfile.ZipFile(source) as archive:
      entries = archive.infolist()
  except zipfile.BadZipFile as error:
    raise SystemExit(f"it is damaged or no file of torch's ({error})") from error
  size = source.stat().st_size
  if any(
    one.compress_type != zipfile.ZIP_STORED or one.file_size > size or one.compress_size > size
    for one in entries
  ):
    raise SystemExit("it holds compressed entries, which torch does not write: do not use it")


def read(source: Path, folder: Path) -> None:
  """Copies the tensors of a .pt file into safetensors files in a folder."""
  content = load(source)
  for name in CONTAINERS:
    content = content.get(name, content) if isinstance(content, dict) else content
  if not isinstance(content, dict):
    raise SystemExit(f"it holds {type(content).__name__}, not named tensors")
  tensors = {name: x for name, x in content.items() if isinstance(x, torch.Tensor)}
  if not tensors:
    raise SystemExit(f"it holds no tensors, nor does {', '.join(CONTAINERS)} of it")
  batch, size, number = {}, 0, 0
  for name, x in tensors.items():
    if batch and size + x.nbytes > MAX_BYTES:
      save_file(batch, folder / f"{number:05d}.safetensors")
      batch, size, number = {}, 0, number + 1
    batch[name] = x.clone(memory_format=torch.contiguous_format)  # Tensors may share memory.
    size += x.nbytes
  save_file(batch, folder / f"{number:05d}.safetensors")


def write(source: Path, target: Path, container: str) -> None:
  """Copies a safetensors file into a .pt file of {container: tensors}.

  Each tensor is a memory map of the source, so that torch copies from disk to disk.
  """
  with source.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    entries = json.loads(file.read(length))
  tensors = {}
  for name, entry in entries.items():
    if name != "__metadata__":
      start, end = entry["data_offsets"]
      window = np.memmap(source, np.uint8, "c", 8 + length + start, (end - start,))
      tensors[name] = torch.from_numpy(window).view(TYPES[entry["dtype"]]).view(entry["shape"])
  torch.save({container: tensors}, target)


if __name__ == "__main__":
  {"read": read, "write": write}[sys.argv[1]](*map(Path, sys.argv[2:4]), *sys.argv[4:])
