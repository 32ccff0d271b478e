"""Models without their parameters, and what they compute in."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cogvideox_jax.errors import UserError

DTYPES = ("auto", "bfloat16", "float32")


def graph_of(model: Callable[..., nnx.Module], config: Any, **options: Any) -> nnx.GraphDef:
  """The structure of a model, which `nnx.merge` joins with parameters; allocates nothing."""
  return nnx.split(nnx.eval_shape(lambda: model(config, **options, rngs=nnx.Rngs(0))))[0]


def compute_dtype(name: str, platform: str | None = None) -> jnp.dtype:
  """The dtype of `float32`, `bfloat16` or `auto`, which is float32 on CPU and else bfloat16.

  platform: of the devices that compute; by default those that JAX uses.
  """
  if name not in DTYPES:
    raise UserError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}.")
  if name == "auto":
    name = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
  return jnp.dtype(name)
