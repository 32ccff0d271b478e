"""Refuses numbers that are not: NaN and infinity in weights, and overflow in a cast."""

from typing import Any

import ml_dtypes
import numpy as np

from cogvideox_jax.errors import UserError

# Sizes of floats in bytes -> the integer of that size, to look at their bits.
_BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_AT_ONCE = 2**24  # Numbers that are looked at together, which bounds the memory.


def check_finite(what: str, *arrays: np.ndarray) -> None:
  """Raises UserError, which begins with `what`, if an array has NaN or infinity."""
  for array in arrays:
    if not is_finite(array):
      raise UserError(
        f"{what} holds numbers that are not finite (NaN or infinity).\n"
        "The file is damaged, or the training that wrote it had diverged; take an earlier one."
      )


def is_finite(array: np.ndarray) -> bool:
  """Whether all numbers of an array are finite.

  Compares exponents as integers, which is several times as fast as `np.isfinite` on bfloat16.
  """
  if array.dtype.kind in "biu":
    return True
  bits = _BITS[array.dtype.itemsize]
  infinity = np.array(np.inf, array.dtype).view(bits)  # Its exponent has all bits, as that of NaN.
  flat = np.ascontiguousarray(array).reshape(-1).view(bits)
  parts = range(0, flat.size, _AT_ONCE)
  return not any(((flat[i : i + _AT_ONCE] & infinity) == infinity).any() for i in parts)


def cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
  """The array in another dtype.

  name: of the tensor, for errors.

  Raises:
    UserError: a finite number becomes infinite.
  """
  with np.errstate(over="ignore"):
    new = array.astype(dtype)
  if not is_finite(new) and is_finite(array):
    largest = float(np.abs(array.astype(np.float32)).max())
    raise UserError(
      f"{name} has numbers up to {largest:.3g}, which overflow in {np.dtype(dtype).name} (at most "
      f"{float(ml_dtypes.finfo(dtype).max):.3g}).\nGive --dtype=bfloat16 or float32."
    )
  return new
