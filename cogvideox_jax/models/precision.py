"""Chooses how exactly accelerators multiply float32 numbers.

By default TPUs round float32 operands to bfloat16, and GPUs to TF32. The frozen networks compute in
float32 only where someone asks for it, so there they multiply in full float32. On CPUs this changes
nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def exact_in_float32(call: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a module's call multiply in full float32 if its first argument, an array, is float32."""

  @functools.wraps(call)
  def exact(self: Any, x: jax.Array, *args: Any) -> Any:
    if x.dtype != jnp.float32:
      return call(self, x, *args)
    with jax.default_matmul_precision("highest"):
      return call(self, x, *args)

  return exact
