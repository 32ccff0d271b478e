"""Layer norm with a hand-written backward pass.

The derived backward pass reads its input some ten times. On TPUs the norms of a block, above all
those of queries and keys, would take as long as a third of its matrix products
(benchmarks/compile.md).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from cogvideox_jax.models.rematerialization import STATISTICS


class LayerNorm(nnx.Module):
  """Normalizes the last axis as torch does: sums in fp32, the variance of fp32 about the mean."""

  def __init__(self, width: int, epsilon: float, *, dtype: DTypeLike, rngs: nnx.Rngs):
    del rngs  # Nothing is drawn: scale starts at one and bias at zero.
    self.epsilon, self.dtype = epsilon, dtype
    self.scale = nnx.Param(jnp.ones(width))
    self.bias = nnx.Param(jnp.zeros(width))

  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    scale, bias = (param[...].astype(self.dtype) for param in (self.scale, self.bias))
    return normalize(x.astype(self.dtype), scale, bias, self.epsilon)


class Residuals(NamedTuple):
  """What the backward pass needs of the forward pass."""

  x: Float[Array, "*b d"]
  scale: Float[Array, "d"]
  mean: Float32[Array, "*b 1"]
  inverse: Float32[Array, "*b 1"]  # One over the standard deviation.


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(
  x: Float[Array, "*b d"], scale: Float[Array, "d"], bias: Float[Array, "d"], epsilon: float
) -> Float[Array, "*b d"]:
  return _forward(_kept_narrow(x), scale, bias, epsilon)[0]


def _forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, Residuals]:
  wide = jnp.float32(x)
  mean = wide.mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(_variance(x, wide, mean) + epsilon)
  mean, inverse = checkpoint_name((mean, inverse), STATISTICS)
  y = (wide - mean) * inverse * jnp.float32(scale) + jnp.float32(bias)
  return y.astype(x.dtype), Residuals(x, scale, mean, inverse)


def _variance(x: Array, wide: Array, mean: Array) -> Array:
  if x.dtype != jnp.bfloat16:
    return jnp.square(wide - mean).mean(-1, keepdims=True)
  # From the mean of squares, because it and the mean take one pass over x. Squares of bfloat16 are
  # exact in float32. A mean of a hundred standard deviations cancels digits of the sums which x,
  # with its 8 bits, does not have anyway.
  return jnp.maximum(jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean), 0)


def _backward(epsilon: float, residuals: Residuals, g: Array) -> tuple[Array, Array, Array]:
  del epsilon
  x, scale, mean, inverse = residuals
  x = _kept_narrow(x)
  g = jnp.float32(g)
  normed = (jnp.float32(x) - mean) * inverse
  scaled = g * jnp.float32(scale)
  along = (scaled * normed).mean(-1, keepdims=True)
  dx = (scaled - scaled.mean(-1, keepdims=True) - normed * along) * inverse
  dscale, dbias = _sum_rows(g * normed), _sum_rows(g)
  return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(scale.dtype)


normalize.defvjp(_forward, _backward)


def _kept_narrow(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
  """Puts a barrier after queries and keys: else XLA also writes them in fp32, and reads those.

  If a backward pass follows, the forward pass needs no barrier, because both share one copy.
  """
  return jax.lax.optimization_barrier(x) if x.ndim > 3 else x


def _sum_rows(x: Float32[Array, "b n *heads d"]) -> Float32[Array, "d"]:
  """Sums over tokens first and heads second; both at once takes twice as long."""
  columns = jax.lax.optimization_barrier(x.sum((0, 1)))
  return columns.sum(tuple(range(columns.ndim - 1)))
