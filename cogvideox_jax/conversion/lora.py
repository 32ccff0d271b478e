"""Reads, writes and fuses LoRA files (arXiv:2106.09685): low-rank updates of a transformer.

A file holds matrices `A` [r, in] and `B` [out, r] for each module that it changes; the weight
becomes `W + scale * B @ A`. lora_names.py reads the names of all trainers, lora_scales.py the
scales. Fusing makes new parameters and leaves the base unchanged.
"""

import os
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Float
from safetensors.numpy import save_file

from cogvideox_jax.conversion import (
  lora_names,
  lora_scales,
  numbers,
  sat_names,
  tensors,
  torch_files,
)
from cogvideox_jax.conversion.components import TRANSFORMER
from cogvideox_jax.conversion.lora_names import ALPHA, PREFIX, A, B, Part
from cogvideox_jax.conversion.names import Row
from cogvideox_jax.conversion.tensors import Layer, Lazy
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.sharding import path_name
from cogvideox_jax.types import Params

FILE = "pytorch_lora_weights.safetensors"
SAT_FILE = "lora.pt"
# The files of a folder that may hold a LoRA: diffusers', PEFT's, their older pickles, SAT's.
FILES = (
  FILE,
  "adapter_model.safetensors",
  "pytorch_lora_weights.bin",
  "adapter_model.bin",
  SAT_FILE,
)
_PEFT_CONFIG = "adapter_config.json"  # Beside PEFT's files.
ASK_ALPHA = (
  "A LoRA of SAT does not say its alpha, and its trainer multiplied it by alpha / {rank}.\n"
  "Give --lora_alpha=ALPHA (lora_alpha= in Python), `lora_alpha` of the training's yaml; SAT's "
  "default is 1"
)


class Update(NamedTuple):
  """The low-rank update of one module's weight."""

  a: Float[np.ndarray, "r ..."]  # [r, in], or [r, in, h, w] of a convolution.
  b: Float[np.ndarray, "out r"]
  scale: float  # alpha / r


LoRA = dict[str, Update]  # Name of the module in diffusers, without PREFIX -> its update.


def read(
  path: epath.PathLike,
  alpha: float | int | None = None,
  *,
  weight_name: str | None = None,
  must_know_alpha: bool = False,
) -> LoRA:
  """The updates of a LoRA file.

  The rank follows from the shapes; alpha is in tensors of the file, in its header, or in PEFT's
  config beside it. If it is in none of them, the scale is 1, as in diffusers. SAT's files never say
  it.

  Args:
    path: safetensors, a .pt or .bin file (needs the extra `convert`), or a folder with one of them.
    alpha: that of all modules, for a file that does not say it.
    weight_name: the file's name in the folder `path`.
    must_know_alpha: refuses a file of SAT without alpha, in place of a warning.

  Raises:
    UserError: the file is damaged, is no plain LoRA, or has nothing for the transformer; or alpha
      is given though the file says it.
  """
  path = find_file(epath.Path(path), weight_name)
  with torch_files.opened(path) as stored:
    fields = _fields(stored.metadata, path)
    return _updates(stored, fields, path, alpha, must_know_alpha)


def from_tensors(named: Mapping[Any, Any], alpha: float | int | None = None) -> LoRA:
  """The updates of a state dict: arrays, or tensors of torch, by their names in a file.

  alpha: that of all modules, if no tensor says it; else the scale is 1, as in diffusers.

  Raises:
    UserError: as `read`.
  """
  if odd := [name for name in named if not isinstance(name, str)]:
    raise UserError(f"The state dict: {odd[0]!r} is no name of a tensor.")
  arrays = {name: _as_array(name, x) for name, x in named.items()}
  return _updates(tensors.InMemory(arrays), {}, "The state dict", alpha, must_know_alpha=False)


def _as_array(name: str, tensor: Any) -> np.ndarray:
  """An array of numpy, jax or torch as one of numpy; torch's bfloat16 becomes float32."""
  if hasattr(tensor, "detach"):
    tensor = tensor.detach().cpu()
    tensor = tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor
  array = np.asarray(tensor)
  if array.dtype.kind not in "fiuV" or array.dtype == object:
    kind = f"an array of {array.dtype}" if array.ndim else type(tensor).__name__
    raise UserError(f"The state dict: {name} is {kind}, not an array of real numbers.")
  return array


def _updates(
  stored: Mapping[str, np.ndarray],
  fields: Mapping[str, Any],
  path: epath.Path | str,
  alpha: float | int | None,
  must_know_alpha: bool,
) -> LoRA:
  """The updates of named tensors.

  Args:
    fields: PEFT's, which say alpha.
    path: names the tensors in errors.
  """
  parts, others = lora_names.find_parts(stored, path)
  is_sat = bool(sat_names.lora_names(stored))
  found = {part: stored[name] for part, name in parts.items()}
  if others:
    warnings.warn(
      f"{path}: {len(others)} tensors belong to other networks than the transformer and are passed "
      f"over; the first is {others[0]}.",
      stacklevel=2,
    )
  matrices = _matrices(found, path)
  alphas = {module: _alpha(module, x, path) for (module, part), x in found.items() if part == ALPHA}
  scales = _scales(matrices, alphas, fields, alpha, path)
  if scales is None and is_sat:
    rank = len(next(iter(matrices.values()))[0])
    if must_know_alpha:
      raise UserError(f"{path}: {ASK_ALPHA.format(rank=rank)}.")
    warnings.warn(f"{path}: {ASK_ALPHA.format(rank=rank)}. Taken at scale 1.", stacklevel=2)
  scales = dict.fromkeys(matrices, 1.0) if scales is None else scales
  for name, (a, b) in matrices.items():
    numbers.check_finite(f"{path}: the update of {name}", a, b, np.asarray(scales[name]))
  return {name: Update(a, b, scales[name]) for name, (a, b) in matrices.items()}


def find_file(path: epath.Path, weight_name: str | None = None) -> epath.Path:
  """The LoRA file at a path: itself, or the one in a folder.

  Raises:
    UserError: there is none, or the folder holds several and none of them has a usual name.
  """
  if weight_name is not None:
    path = path / weight_name
  elif path.is_dir():
    usual = [path / name for name in FILES if (path / name).exists()]
    found = usual[:1] or sorted(path.glob("*.safetensors"))
    if len(found) > 1:
      listed = ", ".join(file.name for file in found)
      raise UserError(f"{path} holds several files ({listed}): give the path of one.")
    path = found[0] if found else path / FILE
  if not path.exists():
    raise UserError(f"There is no LoRA file at {path}.")
  return path


def is_lora(path: epath.Path) -> bool:
  """Whether a safetensors or .pt file holds nothing but LoRA tensors."""
  with torch_files.opened(path) as stored:
    return all(lora_names.is_lora_tensor(name) for name in stored)


def cast(lora: LoRA, dtype: np.dtype) -> LoRA:
  """The same updates in another dtype; UserError if a number is too large for it."""
  return {
    name: Update(
      numbers.cast(x.a, dtype, f"A of {name}"), numbers.cast(x.b, dtype, f"B of {name}"), x.scale
    )
    for name, x in lora.items()
  }


def write(path: epath.PathLike, lora: LoRA) -> None:
  """Writes a safetensors file that diffusers' `load_lora_weights` reads, with the same effect."""
  stored = {}
  for name, update in lora.items():
    b = _scaled_b(update)
    stored[Part(name, A).name] = np.ascontiguousarray(update.a)
    # PEFT's B of a convolution is one with a kernel of one pixel.
    stored[Part(name, B).name] = b.reshape(*b.shape, *(1,) * (update.a.ndim - 2))
  save_file(stored, os.fspath(path), metadata={"format": "pt"})


def write_sat(path: epath.PathLike, lora: LoRA) -> None:
  """Writes a .pt file with SAT's names.

  Raises:
    UserError: torch is not installed, or the LoRA changes a module that SAT's LoRA does not.
  """
  stored = {}
  for name, update in lora.items():
    stored[sat_names.lora_name(f"{name}.lora_A.weight")] = np.ascontiguousarray(update.a)
    stored[sat_names.lora_name(f"{name}.lora_B.weight")] = _scaled_b(update)
  torch_files.write(path, "module", tensors.InMemory(stored))


def _scaled_b(update: Update) -> np.ndarray:
  """B times the scale: diffusers' header holds one alpha for all modules, a SAT file none."""
  return (update.b * np.asarray(update.scale, update.b.dtype)).astype(update.b.dtype)


def fuse(params: Params, config: DiTConfig, lora: LoRA, weight: float = 1.0) -> Params:
  """The parameters plus `weight` times the updates, computed lazily; `params` do not change.

  The sum is computed in fp32 and rounded to the dtype of the parameters.

  Raises:
    UserError: the transformer does not have a module that the LoRA changes, or has another shape
      there.
  """
  rows = TRANSFORMER.rows(config), TRANSFORMER.shapes(config)
  slots = {slot.name: slot for slot in tensors.slots(*rows)}
  changes: dict[str, dict[Layer, list[_Change]]] = defaultdict(lambda: defaultdict(list))
  for module, update in lora.items():
    slot = slots.get(f"{module}.weight")
    if slot is None:
      raise UserError(f"The LoRA changes {module}, which this transformer does not have.")
    tensors.check_shape(module, (len(update.b), *update.a.shape[1:]), slot.shape)
    changes[slot.path][slot.layer].append(_Change(update, slot.row, weight))

  def leaf(path, old):
    found = changes.get(path_name(path))
    return _Fused(old, found) if found else old

  return jax.tree_util.tree_map_with_path(leaf, params)


class _Change(NamedTuple):
  """An update and the weight that it changes."""

  update: Update
  row: Row  # The row of the weight in its table of names.
  weight: float

  def delta(self) -> Float[np.ndarray, "..."]:
    """The summand, with the axes of our parameter."""
    a, b, scale = self.update
    delta = np.tensordot(b.astype(np.float32), a.astype(np.float32), 1)
    return self.row.to_ours(delta * np.float32(scale * self.weight))


class _Fused(Lazy):
  """A parameter with updates of some of its layers."""

  def __init__(self, base: Any, changes: Mapping[Layer, Sequence[_Change]]):
    self.shape, self.dtype = base.shape, np.dtype(base.dtype)
    self.layers = [...] if ... in changes else range(self.shape[0])
    self._base, self._changes = base, changes

  def __getitem__(self, layer: Layer) -> np.ndarray:
    base = np.asarray(self._base[layer])
    total = base.astype(np.float32)
    for change in self._changes.get(layer, ()):
      total += change.delta()
    return total.astype(base.dtype)


def _fields(metadata: Mapping[str, str], path: epath.Path) -> dict[str, Any]:
  """What a file says of itself in PEFT's terms: in its header, else in PEFT's config beside it."""
  if fields := lora_scales.header_fields(metadata, path):
    return fields
  config = path.parent / _PEFT_CONFIG
  if path.stem != "adapter_model" or not config.exists():
    return {}
  return lora_scales.parsed(config.read_text(), str(config))


def _matrices(
  found: Mapping[Part, np.ndarray], path: epath.Path | str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Name of a module -> its A, and its B with two axes.

  Raises:
    UserError: one of the two is missing, their shapes do not fit, or there is none.
  """
  matrices = {}
  for module in sorted({part.module for part in found}):
    if missing := [part for part in (Part(module, A), Part(module, B)) if part not in found]:
      raise UserError(f"{path} lacks {missing[0].name}.")
    a, b = found[Part(module, A)], found[Part(module, B)]
    if not a.size or not b.size:
      raise UserError(f"{path}: the matrices of {module} hold no number: they change nothing.")
    if a.ndim < 2 or a.shape[:1] != b.shape[1:2] or b.size != b.shape[0] * b.shape[1]:
      raise UserError(
        f"{path}: the matrices of {module} do not fit: A is {list(a.shape)}, [rank, inputs], and B "
        f"{list(b.shape)}, [outputs, rank].\nThe file is damaged, or of another kind than LoRA."
      )
    matrices[module] = a, b.reshape(b.shape[:2])
  if not matrices:
    raise UserError(f"{path} changes nothing of a transformer: no tensor begins with {PREFIX!r}.")
  return matrices


def _alpha(module: str, tensor: np.ndarray, path: epath.Path | str) -> float:
  """The number in a tensor `alpha`."""
  if tensor.size != 1:
    raise UserError(f"{path}: alpha of {module} has shape {list(tensor.shape)}; it is one number.")
  return float(tensor.reshape(()))


def _scales(
  matrices: Mapping[str, tuple[np.ndarray, np.ndarray]],
  alphas: Mapping[str, float],
  fields: Mapping[str, Any],
  given: float | int | None,
  path: epath.Path | str,
) -> dict[str, float] | None:
  """Name of a module -> alpha / r; None if neither the file nor the caller says alpha.

  Args:
    alphas: of the tensors `alpha`.
    fields: PEFT's.
    given: the caller's alpha.
  """
  ranks = {module: len(a) for module, (a, _) in matrices.items()}
  if given is not None and not given > 0:
    raise UserError(f"--lora_alpha={given:g} must be above 0; --lora_weight is what may be 0.")
  if given is not None and (alphas or fields):
    raise UserError(
      f"{path} says its alpha itself: leave --lora_alpha={given:g} out; --lora_weight scales it."
    )
  if given is not None:
    return {module: given / rank for module, rank in ranks.items()}
  if not alphas:
    return lora_scales.by_fields(fields, ranks, path) if fields else None
  # Without the tensor, or if it is 0, alpha is r, as in kohya's loader.
  scales = {module: (alphas.get(module) or rank) / rank for module, rank in ranks.items()}
  if fields and lora_scales.by_fields(fields, ranks, path) != scales:
    raise UserError(f"{path}: the tensors `alpha` say another scale than PEFT's fields do.")
  return scales
