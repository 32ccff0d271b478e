"""LoRA adapters of a pipeline, with the names of diffusers' `CogVideoXLoraLoaderMixin`."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from etils import epath

from cogvideox_jax.conversion import lora, tensors
from cogvideox_jax.conversion.lora import LoRA
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference.offload import on_devices
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.types import Params


class Adapters:
  """Keeps the base weights and the adapters apart; the transformer runs on their sum.

  A subclass sets `config` and `_params`. Its programs take the sum as they take any weights, so
  that an adapter needs no new compilation.
  """

  config: DiTConfig
  _params: Params

  def __init__(self) -> None:
    self._base: Params | None = None  # The weights without adapters; None if none was loaded.
    self._adapters: dict[str, tuple[LoRA, float]] = {}  # By name, each with its weight.

  def load_lora_weights(
    self,
    path: epath.PathLike,
    adapter_name: str = "default",
    *,
    weight_name: str | None = None,
    lora_alpha: float | int | None = None,
  ) -> None:
    """Adds an adapter with weight 1.

    Args:
      path: a LoRA file, or a folder that holds one; see `conversion.lora.read`.
      adapter_name: for `set_adapters`.
      weight_name: the file's name in the folder `path`.
      lora_alpha: alpha of all modules, for a file that does not say it, as SAT's.

    Raises:
      UserError: it is no LoRA of this transformer, or there is an adapter of that name.
    """
    self.add_lora(lora.read(path, lora_alpha, weight_name=weight_name), adapter_name)

  def add_lora(
    self, updates: LoRA, adapter_name: str = "default", weight: float | int = 1.0
  ) -> None:
    """Adds an adapter that was read; see `load_lora_weights`."""
    if adapter_name in self._adapters:
      raise UserError(f"There is an adapter {adapter_name!r} already; give another adapter_name.")
    self._apply({**self._adapters, adapter_name: (updates, weight)})

  def set_adapters(self, names: Sequence[str], weights: Sequence[float] | float = 1.0) -> None:
    """Sets the weights of these adapters, one for all or one for each, and of all others to 0.

    Raises:
      UserError: there is no adapter of a name, or the weights are too few or too many.
    """
    each = [weights] * len(names) if isinstance(weights, int | float) else list(weights)
    if unknown := [name for name in names if name not in self._adapters]:
      raise UserError(f"There is no adapter {unknown[0]!r}; loaded are {sorted(self._adapters)}.")
    if len(each) != len(names):
      raise UserError(f"{len(each)} weights for {len(names)} adapters: pass one, or one for each.")
    chosen = dict(zip(names, each, strict=True))
    self._apply({name: (x, chosen.get(name, 0.0)) for name, (x, _) in self._adapters.items()})

  def fuse_lora(self, lora_scale: float = 1.0) -> None:
    """Adds the adapters, times lora_scale, to the base weights, and forgets them."""
    self._apply({name: (x, weight * lora_scale) for name, (x, weight) in self._adapters.items()})
    self._base, self._adapters = None, {}

  @contextmanager
  def _scaled(self, scale: float) -> Iterator[None]:
    """Multiplies the weights of all adapters until the context ends."""
    adapters = self._adapters
    if scale == 1 or not adapters:
      yield
      return
    self._apply({name: (x, weight * scale) for name, (x, weight) in adapters.items()})
    try:
      yield
    finally:
      self._apply(adapters)

  def unload_lora_weights(self) -> None:
    """Removes all adapters, which restores the base weights bit by bit."""
    self._apply({})
    self._base = None

  def _apply(self, adapters: dict[str, tuple[LoRA, float]]) -> None:
    for name, (_, weight) in adapters.items():
      if not math.isfinite(weight):
        raise UserError(f"The weight of the adapter {name!r} is {weight}: it must be finite.")
    base = self._params if self._base is None else self._base
    # On the devices, because JAX cannot slice layers of arrays that are sharded in host memory.
    with on_devices(base) as readable:
      total = readable
      for updates, weight in adapters.values():
        total = lora.fuse(total, self.config, updates, weight)
      total = tensors.materialize(total)
      self._params = jax.tree.map(_put_back, total, readable, base)
    self._base, self._adapters = base, adapters


def _put_back(new: Any, readable: jax.Array, old: jax.Array) -> jax.Array:
  """Puts a changed parameter in the old one's memory; returns the old one if nothing changed."""
  return old if new is readable else jax.device_put(new, old.sharding)
