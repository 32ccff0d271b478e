"""LoRA (arXiv:2106.09685): low-rank changes of a transformer's weights, in diffusers' files.

A file holds, for each module that it changes, `A` [r, in] and `B` [out, r]; the weight becomes
`W + scale * B @ A`. Kept apart from the weights until `fuse`, so that the base stays as it was.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cogvideox_jax.conversion import names, tensors
from cogvideox_jax.conversion.tensors import Params
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit import DiT, DiTConfig

PREFIX = "transformer."
METADATA = "lora_adapter_metadata"  # diffusers' key of the file's header.
FILE = "pytorch_lora_weights.safetensors"


class Update(NamedTuple):
  """The change of one module's weight."""

  a: Float[np.ndarray, "r in"]
  b: Float[np.ndarray, "out r"]
  scale: float  # alpha / r.


LoRA = dict[str, Update]  # By the module's name in diffusers, without PREFIX.


def load(path: epath.PathLike) -> LoRA:
  """The updates of a LoRA file, or of the one that diffusers names in a folder.

  The rank is read off each module. The header may say alpha; where it does not, alpha is the rank
  and the scale 1, whatever the file was trained with: set the adapter's weight to alpha / rank.

  Raises:
    UserError: the file is damaged, has tensors that are no LoRA's, or none for the transformer.
  """
  path = epath.Path(path)
  path = path / FILE if path.is_dir() else path
  try:
    with safe_open(os.fspath(path), framework="np") as file:
      header = file.metadata() or {}
      stored = file.keys()
      found = {name: file.get_tensor(name) for name in stored}
  except (OSError, SafetensorError) as error:
    raise UserError(f"{path} is not a LoRA file in safetensors ({error}).") from error
  if strange := sorted(name for name in found if "lora" not in name):
    raise UserError(f"{path} is not a LoRA file: it has {strange[0]}.")
  if dora := [name for name in found if "dora_scale" in name]:
    warnings.warn(f"{path}: {len(dora)} DoRA scales are passed over.", stacklevel=2)
  updates = _updates({name: x for name, x in found.items() if "dora_scale" not in name}, path)
  scales = _scales(json.loads(header.get(METADATA, "{}")), updates)
  return {name: Update(a, b, scales[name]) for name, (a, b) in updates.items()}


def save(path: epath.PathLike, lora: LoRA) -> None:
  """Writes a file that diffusers' `load_lora_weights` reads, to the same effect.

  Scales that are not 1 are multiplied into B, since a header can hold one alpha only.
  """
  stored = {}
  for name, update in lora.items():
    scaled = (update.b * np.asarray(update.scale, update.b.dtype)).astype(update.b.dtype)
    stored[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(update.a)
    stored[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(scaled)
  save_file(stored, os.fspath(path), metadata={"format": "pt"})


def fuse(params: Params, config: DiTConfig, lora: LoRA, weight: float = 1.0) -> Params:
  """The parameters with the updates added, times `weight`; those given are not changed.

  Sums are made in fp32 and rounded to the parameters' type.

  Raises:
    UserError: the LoRA changes a module that this transformer does not have, or of another shape.
  """
  shapes = tensors.abstract_params(DiT, config)
  slots = {slot.name: slot for slot in tensors.slots(names.transformer(config), shapes)}
  flat = {
    tensors.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  changed: dict[str, np.ndarray] = {}
  for module, update in lora.items():
    slot = slots.get(f"{module}.weight")
    if slot is None or len(slot.shape) != 2:
      raise UserError(f"The LoRA changes {module}, which this transformer does not have.")
    delta = update.b.astype(np.float32) @ update.a.astype(np.float32)
    tensors.check_shape(module, delta.shape, slot.shape)
    change = slot.row.to_ours(delta * np.float32(update.scale * weight))
    if slot.path not in changed:
      changed[slot.path] = np.array(flat[slot.path], np.float32)
    place = ... if slot.layer is None else slot.layer
    changed[slot.path][place] += change

  def leaf(path, old):
    new = changed.get(tensors.path_name(path))
    return old if new is None else new.astype(old.dtype)

  return jax.tree_util.tree_map_with_path(leaf, params)


def _updates(
  found: Mapping[str, np.ndarray], path: epath.Path
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """A and B of each module."""
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
  """alpha / r of each module: of the header, by PEFT's rules, or 1."""
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
