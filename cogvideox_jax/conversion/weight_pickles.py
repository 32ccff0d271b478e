"""Reads the weights of a component in PyTorch's older files, such as `pytorch_model.bin`.

Only torch's restricted loader reads them (torch_file.py), which needs the extra `convert`.
"""

import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence

from etils import epath

from cogvideox_jax.conversion import torch_files
from cogvideox_jax.conversion.safetensors_file import SafetensorsFiles, plain_name
from cogvideox_jax.errors import UserError

STEMS = ("diffusion_pytorch_model", "pytorch_model")  # The names in diffusers, in transformers.
VARIANTS = ("", ".fp16", ".bf16", ".fp32")


def find(folder: epath.Path) -> list[epath.Path]:
  """The files of weights in a component's folder, in the order of an index; none: an empty list.

  Raises:
    UserError: an index is damaged, or a file that it names is missing.
  """
  for stem in STEMS:
    for variant in VARIANTS:
      index = folder / f"{stem}.bin.index{variant}.json"
      if index.exists():
        return _named_by(index)
      if (file := folder / f"{stem}{variant}.bin").exists():
        return [file]
  return []


def _named_by(index: epath.Path) -> list[epath.Path]:
  try:
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(f"{index} is damaged; fetch it again.") from error
  files = [index.parent / plain_name(name, index) for name in names]
  if missing := [file.name for file in files if not file.exists()]:
    raise UserError(f"{index} names {missing[0]}, which is not there; fetch the folder again.")
  return files


def read(files: Sequence[epath.Path], aliases: Mapping[str, str]) -> SafetensorsFiles:
  """The tensors of files, which are copied to a temporary folder until the result is dropped.

  aliases: as in `SafetensorsFiles`.

  Raises:
    UserError: torch is not installed, or a file is damaged or holds more than tensors.
  """
  scratch = epath.Path(tempfile.mkdtemp(prefix="torch-"))
  try:
    copies = []
    for number, file in enumerate(files):
      copy = scratch / str(number)
      copy.mkdir()
      torch_files.copy(file, copy)
      copies += sorted(copy.glob("*.safetensors"))
    found = SafetensorsFiles(copies, aliases)
  except BaseException:
    scratch.rmtree()
    raise
  weakref.finalize(found, shutil.rmtree, scratch, ignore_errors=True)
  return found
