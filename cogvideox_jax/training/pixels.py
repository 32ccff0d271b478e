"""Turns frames of bytes into numbers in [-1, 1], which the VAE takes, and back."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def to_float(frames: UInt8[Array, "..."]) -> Float[Array, "..."]:
  """Turns bytes into [-1, 1]."""
  return jnp.float32(frames) / 127.5 - 1


def to_bytes(frames: Float[Array, "..."]) -> UInt8[Array, "..."]:
  """Turns [-1, 1] into bytes; what is outside is clipped."""
  return jnp.round((jnp.clip(frames, -1, 1) + 1) * 127.5).astype(jnp.uint8)
