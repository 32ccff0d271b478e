"""The structure of models without their parameters, and the type that they compute in."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cogvideox_jax.errors import UserError

DTYPES = ("auto", "bfloat16", "float32")


class _SameKey(nnx.RngStream):
  """Gives every parameter the same key, which is enough because shapes do not depend on it.

  The plain stream counts its keys, and tracing then takes time quadratic in the number of
  parameters, because flax asks the traced count for its sharding: JAX raises an error, for whose
  text it searches all that was traced before.
  """

  def __call__(self) -> jax.Array:
    return self.key[...]


@functools.cache
def abstract(
  model: Callable[..., nnx.Module], config: Any, **options: Any
) -> tuple[nnx.GraphDef, dict[str, Any]]:
  """A model's structure and the shapes of its parameters; allocates nothing.

  Each model is traced once a process, so the result is shared and must not be changed.

  Args:
    model: its class.
    config: the model's config, hashable.
    options: what else the class takes, hashable.
  """

  def make() -> nnx.Module:
    rngs = nnx.Rngs(0)
    rngs.default = _SameKey(0, tag="default")  # pyright: ignore[reportAttributeAccessIssue]
    return model(config, **options, rngs=rngs)

  graph, params = nnx.split(nnx.eval_shape(make), nnx.Param)
  return graph, nnx.to_pure_dict(params)


def graph_of(model: Callable[..., nnx.Module], config: Any, **options: Any) -> nnx.GraphDef:
  """The structure of a model, which `nnx.merge` joins with parameters; allocates nothing."""
  return abstract(model, config, **options)[0]


def compute_dtype(name: str, platform: str | None = None) -> jnp.dtype:
  """The dtype of `float32`, `bfloat16` or `auto`, which is float32 on CPU and else bfloat16.

  platform: of the devices that compute; by default those that JAX uses.
  """
  if name not in DTYPES:
    raise UserError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}.")
  if name == "auto":
    name = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
  return jnp.dtype(name)
