"""Copies the tensors of a PyTorch file to safetensors: `python -m ... FILE.pt FOLDER`.

A process of its own, with the extra `convert`: torch's restricted loader builds tensors and nothing
else from the pickle, and what it takes of memory ends with it.
"""

import sys
from pathlib import Path

try:
  import torch  # pyright: ignore[reportMissingImports] - of the extra, absent where it is linted.
  from safetensors.torch import save_file
except ImportError as error:
  raise SystemExit("PyTorch is needed for it: pip install -e '.[convert]'") from error

CONTAINERS = ("model", "module", "state_dict")  # Where a file may keep its tensors.
MAX_BYTES = 2**31  # Of one file; what it holds is in memory at once.


def main(source: Path, folder: Path) -> None:
  content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
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
    batch[name] = x.clone(memory_format=torch.contiguous_format)  # Names may share memory.
    size += x.nbytes
  save_file(batch, folder / f"{number:05d}.safetensors")


if __name__ == "__main__":
  main(Path(sys.argv[1]), Path(sys.argv[2]))
