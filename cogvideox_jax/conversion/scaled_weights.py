"""Reads weights of eight bits that have a scale beside them, as ComfyUI and torchao write them.

The weight is scale * value, one scale for the tensor or one for each output. Scales of activations
(`input_scale`, `scale_input`) change how a kernel computes and not the weight, and are left out.
"""

from collections.abc import Iterator

import numpy as np

from cogvideox_jax.conversion.safetensors_file import SafetensorsFiles
from cogvideox_jax.conversion.tensors import Spec, Tensors
from cogvideox_jax.errors import UserError

_WEIGHT = ".weight"
_SCALES = (".scale_weight", ".weight_scale", ".weight.scale")
_OF_ACTIVATIONS = (".scale_input", ".input_scale")
_BLOCKWISE = ".weight_scale_inv"
_MARKER = "scaled_fp8"  # An empty tensor by which ComfyUI marks its files.


def unscaled(found: SafetensorsFiles) -> Tensors:
  """The tensors of files, in which scaled weights are float32: scale * value.

  Raises:
    UserError: a scale is of a kind that is not supported.
  """
  scales = {}
  for name in found:
    module = name.removesuffix(_WEIGHT)
    if name.endswith(_WEIGHT) and found.is_eight_bits(name):
      if module + _BLOCKWISE in found:
        raise UserError(
          f"{module + _BLOCKWISE}: scales of blocks of a weight are not supported.\n"
          "Fetch the model in bfloat16."
        )
      if known := [module + end for end in _SCALES if module + end in found]:
        scales[name] = known[0]
        _check_scale(name, found.spec(name).shape, known[0], found.spec(known[0]).shape)
  return _Unscaled(found, scales) if scales else found


def _check_scale(name: str, shape: tuple[int, ...], scale: str, its_shape: tuple[int, ...]) -> None:
  one_each = its_shape[:1] == shape[:1] and all(size == 1 for size in its_shape[1:])
  if np.prod(its_shape, dtype=int) != 1 and not one_each:
    raise UserError(
      f"{scale} has shape {list(its_shape)}: it must be one number, or one for each of the "
      f"{shape[0]} outputs of {name}.\nFetch the model in bfloat16."
    )


class _Unscaled(Tensors):
  """The tensors of files, some of them times their scales."""

  def __init__(self, found: SafetensorsFiles, scales: dict[str, str]):
    """scales: name of a weight -> name of its scale."""
    self._found, self._scales = found, scales
    modules = {name.removesuffix(_WEIGHT) for name in scales}
    left_out = {*scales.values(), _MARKER}
    left_out |= {module + end for module in modules for end in _OF_ACTIVATIONS}
    self._names = [name for name in found if name not in left_out]

  def spec(self, name: str) -> Spec:
    spec = self._found.spec(name)
    return Spec(np.dtype(np.float32), spec.shape) if name in self._scales else spec

  def __getitem__(self, name: str) -> np.ndarray:
    array = self._found[name]
    if name not in self._scales:
      return array
    scale = self._found[self._scales[name]].astype(np.float32)
    return array.astype(np.float32) * scale.reshape(-1, *(1,) * (array.ndim - 1))

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)
