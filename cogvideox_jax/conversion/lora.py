"""Reads, writes and fuses LoRA files (arXiv:2106.09685): low-rank updates of a transformer.

A file of diffusers or SAT holds matrices `A` [r, in] and `B` [out, r] for each module that it
changes; the weight becomes `W + scale * B @ A`. Fusing makes new parameters and leaves the base
unchanged.
"""

import json
import math
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Float
from safetensors.numpy import save_file

from cogvideox_jax.conversion import sat_names, tensors, torch_files
from cogvideox_jax.conversion.components import TRANSFORMER
from cogvideox_jax.conversion.names import Row
from cogvideox_jax.conversion.tensors import Layer, Lazy
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.sharding import path_name
from cogvideox_jax.types import Params

PREFIX = "transformer."
METADATA = "lora_adapter_metadata"  # diffusers' key in the header of the file.
FILE = "pytorch_lora_weights.safetensors"
SAT_FILE = "lora.pt"
# Names from before PEFT, which diffusers still reads -> today's names.
_OLDER = (
  (re.compile(r"\.processor\."), "."),
  (re.compile(r"(to_q|to_k|to_v)_lora\.down\."), r"\1.lora_A."),
  (re.compile(r"(to_q|to_k|to_v)_lora\.up\."), r"\1.lora_B."),
  (re.compile(r"to_out_lora\.down\."), "to_out.0.lora_A."),
  (re.compile(r"to_out_lora\.up\."), "to_out.0.lora_B."),
  (re.compile(r"\.lora(\.|_linear_layer\.)down\."), ".lora_A."),
  (re.compile(r"\.lora(\.|_linear_layer\.)up\."), ".lora_B."),
)


class Update(NamedTuple):
  """The low-rank update of one module's weight."""

  a: Float[np.ndarray, "r in"]
  b: Float[np.ndarray, "out r"]
  scale: float  # alpha / r


LoRA = dict[str, Update]  # Name of the module in diffusers, without PREFIX -> its update.


def read(path: epath.PathLike) -> LoRA:
  """The updates of a LoRA file.

  The rank follows from the shapes. The header may say alpha. If it does not, as in SAT's files, the
  scale is 1, whatever alpha the file was trained with; then set the adapter's weight to
  alpha / rank.

  path: safetensors, a .pt file (needs the extra `convert`), or a folder with diffusers' FILE.

  Raises:
    UserError: the file is damaged, holds tensors of no LoRA, or none for the transformer.
  """
  path = epath.Path(path)
  path = path / FILE if path.is_dir() else path
  if not path.exists():
    raise UserError(f"There is no LoRA file at {path}.")
  with torch_files.opened(path) as stored:
    found = {
      PREFIX + name: stored[sat_name] for name, sat_name in sat_names.lora_names(stored).items()
    }
    if not found:
      found = {name: stored[name] for name in stored}
    header = json.loads(stored.metadata.get(METADATA, "{}"))
  if strange := sorted(name for name in found if "lora" not in name):
    raise UserError(f"{path} is not a LoRA file: it has {strange[0]}.")
  if dora := [name for name in found if "dora_scale" in name]:
    warnings.warn(f"{path}: {len(dora)} DoRA scales are passed over.", stacklevel=2)
  updates = _updates({_today(n): x for n, x in found.items() if "dora_scale" not in n}, path)
  scales = _scales(header, updates)
  return {name: Update(a, b, scales[name]) for name, (a, b) in updates.items()}


def is_lora(path: epath.Path) -> bool:
  """Whether a safetensors or .pt file holds nothing but LoRA tensors."""
  with torch_files.opened(path) as stored:
    return all("lora" in name or sat_names.lora_names([name]) for name in stored)


def _today(name: str) -> str:
  """A tensor's name in today's files."""
  for pattern, replacement in _OLDER:
    name = pattern.sub(replacement, name)
  return name


def write(path: epath.PathLike, lora: LoRA) -> None:
  """Writes a safetensors file that diffusers' `load_lora_weights` reads, with the same effect."""
  stored = {}
  for name, update in lora.items():
    stored[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(update.a)
    stored[f"{PREFIX}{name}.lora_B.weight"] = _scaled_b(update)
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
    if slot is None or len(slot.shape) != 2:
      raise UserError(f"The LoRA changes {module}, which this transformer does not have.")
    tensors.check_shape(module, (len(update.b), update.a.shape[1]), slot.shape)
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
    delta = b.astype(np.float32) @ a.astype(np.float32)
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


def _updates(
  found: Mapping[str, np.ndarray], path: epath.Path
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Name of a module -> its A and B.

  Raises:
    UserError: one of the two is missing, a tensor is of another kind, or there is none.
  """
  if others := sorted(name for name in found if not name.startswith(PREFIX)):
    warnings.warn(
      f"{path}: {len(others)} tensors do not begin with {PREFIX!r} and are passed over, as in "
      f"diffusers; the first is {others[0]}.",
      stacklevel=3,
    )
  ours = {name.removeprefix(PREFIX): x for name, x in found.items() if name.startswith(PREFIX)}
  modules = {name.split(".lora_")[0] for name in ours}
  updates, known = {}, set()
  for module in sorted(modules):
    keys = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    if missing := [key for key in keys if key not in ours]:
      raise UserError(f"{path} lacks {PREFIX}{missing[0]}.")
    updates[module] = tuple(ours[key] for key in keys)
    known.update(keys)
  if unknown := sorted(ours.keys() - known):
    raise UserError(f"{path} has {PREFIX}{unknown[0]}, which is not supported.")
  if not updates:
    raise UserError(f"{path} changes nothing of a transformer: no tensor begins with {PREFIX!r}.")
  return updates


def _scales(
  metadata: Mapping[str, object], updates: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, float]:
  """Name of a module -> alpha / r, by PEFT's rules from the header; 1 if it does not say alpha."""
  fields = {name.removeprefix(PREFIX): value for name, value in metadata.items()}
  if fields.get("lora_alpha") is None:
    return dict.fromkeys(updates, 1.0)
  patterns = fields.get("alpha_pattern") or {}
  scales = {}
  for module, (a, _) in updates.items():
    alpha = fields["lora_alpha"]
    if isinstance(patterns, Mapping):
      matches = [v for k, v in patterns.items() if module == k or module.endswith(f".{k}")]
      alpha = matches[0] if matches else alpha
    rank = math.sqrt(len(a)) if fields.get("use_rslora") else len(a)
    scales[module] = float(str(alpha)) / rank
  return scales
