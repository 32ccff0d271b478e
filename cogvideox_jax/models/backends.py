"""Chooses the attention function for a kind of device."""

from functools import cache, partial
from typing import Any

from cogvideox_jax.errors import UserError
from cogvideox_jax.models import attention
from cogvideox_jax.models.kernels.block_grid import fit_blocks
from cogvideox_jax.models.kernels.segment_attention import BLOCK_SIZES
from cogvideox_jax.models.kernels.segment_attention import attention as kernel_attention
from cogvideox_jax.models.layers import Attention


def attention_for(device: Any) -> Attention:
  """The fastest attention for the device; the same function each time for the same kind.

  device: a `jax.Device`, or one of a topology for ahead-of-time compilation.

  Raises:
    UserError: the device is a TPU of a kind without an entry in BLOCK_SIZES.
  """
  return _attention_for(device.platform, device.device_kind)


def filled(tokens: int, device: Any) -> int:
  """The row length at which the device's attention pads nothing: `tokens` or a little more."""
  if device.platform != "tpu":
    return tokens
  return tokens + -tokens % fit_blocks(tokens, BLOCK_SIZES[device.device_kind]).block


@cache
def _attention_for(platform: str, kind: str) -> Attention:
  if platform != "tpu":
    return attention.attention
  if kind not in BLOCK_SIZES:
    raise UserError(
      f"No block sizes are known for a {kind!r}; known are {', '.join(BLOCK_SIZES)}.\n"
      "Add it to BLOCK_SIZES in cogvideox_jax/models/kernels/segment_attention.py."
    )
  return partial(kernel_attention, sizes=BLOCK_SIZES[kind])
