"""Which attention a device runs."""

from functools import cache, partial
from typing import Protocol

from cogvideox_jax.models import attention, splash
from cogvideox_jax.models.layers import Attention


class Device(Protocol):
  """A `jax.Device`, or one of a topology that is compiled for without it."""

  platform: str
  device_kind: str


def attention_for(device: Device) -> Attention:
  """The fastest attention for a kind of device: always the same function for the same kind."""
  return _attention_for(device.platform, device.device_kind)


@cache
def _attention_for(platform: str, kind: str) -> Attention:
  if platform != "tpu":
    return attention.attention
  return partial(splash.attention, chip=splash.CHIPS[kind])
