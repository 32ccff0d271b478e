"""Checks of single arguments."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cogvideox_jax.errors import UserError


def whole(name: str, value: Any) -> int:
  """An argument as an integer: numpy's integers and whole floats are taken, too.

  Raises:
    UserError: it is no whole number.
  """
  is_number = isinstance(value, int | float | np.integer | np.floating)
  if not is_number or isinstance(value, bool) or not float(value).is_integer():
    raise UserError(f"{name}={value!r}: must be a whole number.")
  return int(value)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
  """Raises UserError for a value that is not one of the choices."""
  if value not in choices:
    raise UserError(f"{name}={value!r}: must be one of {', '.join(choices)}.")


def check_finite(what: str, array: Array | np.ndarray, advice: str) -> None:
  """Raises UserError, with advice, if an array has NaN or infinity."""
  if not bool(jnp.isfinite(jnp.asarray(array)).all()):
    raise UserError(f"{what} has numbers that are not finite (NaN or infinity).\n{advice}")


def check_shape(name: str, array: Array | np.ndarray, shape: tuple[int, ...]) -> None:
  """Raises UserError unless an array of the caller's has the shape that the call needs."""
  if array.shape != shape:
    raise UserError(f"{name} has shape {tuple(array.shape)}; this call needs {shape}.")
