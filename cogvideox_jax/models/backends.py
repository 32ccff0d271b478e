"""Which attention a device runs."""

from functools import cache, partial
from typing import Any

from cogvideox_jax.errors import UserError
from cogvideox_jax.models import attention
from cogvideox_jax.models.kernels import segment_attention
from cogvideox_jax.models.layers import Attention


def attention_for(device: Any) -> Attention:
  """The fastest attention for a kind of device: always the same function for the same kind.

  device: a `jax.Device`, or one of a topology that is compiled for without it.

  Raises:
    UserError: it is a TPU of a kind that has no block sizes.
  """
  return _attention_for(device.platform, device.device_kind)


def filled(tokens: int, device: Any) -> int:
  """The tokens of a row and of the filling that its attention would add: so long, it needs none."""
  if device.platform != "tpu":
    return tokens
  blocks = segment_attention.fitting(tokens, segment_attention.BLOCKS[device.device_kind])
  return tokens + -tokens % blocks.size


@cache
def _attention_for(platform: str, kind: str) -> Attention:
  if platform != "tpu":
    return attention.attention
  if kind not in segment_attention.BLOCKS:
    raise UserError(
      f"No block sizes are known for a {kind!r}; known are {', '.join(segment_attention.BLOCKS)}.\n"
      "Add it to BLOCKS in cogvideox_jax/models/kernels/segment_attention.py."
    )
  return partial(segment_attention.attention, blocks=segment_attention.BLOCKS[kind])
