"""LoRA on a pipeline, with the names of diffusers' `CogVideoXLoraLoaderMixin`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from etils import epath

from cogvideox_jax.conversion import lora, tensors
from cogvideox_jax.conversion.lora import LoRA
from cogvideox_jax.conversion.tensors import Params
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference import residence
from cogvideox_jax.models.dit_config import DiTConfig


class Adapters:
  """Keeps the base weights and the adapters apart; the network runs on their sum.

  A class that stands on it sets `config` and `_params`, whose programs take the sum like any other
  weights: nothing is compiled anew.
  """

  config: DiTConfig
  _params: Params

  def __init__(self) -> None:
    self._base: Params | None = None  # None while no adapter is loaded.
    self._adapters: dict[str, tuple[LoRA, float]] = {}

  def load_lora_weights(self, path: epath.PathLike, adapter_name: str = "default") -> None:
    """Adds a LoRA file, or that of a folder, with weight 1; `conversion.lora.load` says more.

    Raises:
      UserError: it is no LoRA of this transformer, or there is an adapter of that name.
    """
    if adapter_name in self._adapters:
      raise UserError(f"There is an adapter {adapter_name!r} already; give another adapter_name.")
    loaded = lora.load(path)
    self._apply({**self._adapters, adapter_name: (loaded, 1.0)})

  def set_adapters(self, names: Sequence[str], weights: Sequence[float] | float = 1.0) -> None:
    """Runs with these adapters at these weights, one for all or one each; others have weight 0."""
    each = [weights] * len(names) if isinstance(weights, int | float) else list(weights)
    if unknown := [name for name in names if name not in self._adapters]:
      raise UserError(f"There is no adapter {unknown[0]!r}; loaded are {sorted(self._adapters)}.")
    if len(each) != len(names):
      raise UserError(f"{len(each)} weights for {len(names)} adapters: pass one, or one for each.")
    chosen = dict(zip(names, each, strict=True))
    self._apply({name: (x, chosen.get(name, 0.0)) for name, (x, _) in self._adapters.items()})

  def fuse_lora(self, lora_scale: float = 1.0) -> None:
    """Makes the adapters, times lora_scale, part of the base weights."""
    self._apply({name: (x, weight * lora_scale) for name, (x, weight) in self._adapters.items()})
    self._base, self._adapters = None, {}

  @contextmanager
  def _scaled(self, scale: float) -> Iterator[None]:
    """Multiplies the weights of all adapters for the while."""
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
    """Goes back to the base weights."""
    self._apply({})
    self._base = None

  def _apply(self, adapters: dict[str, tuple[LoRA, float]]) -> None:
    base = self._params if self._base is None else self._base
    # JAX cuts no layers of arrays that are split in the host's memory.
    with residence.on_devices(base) as readable:
      total = readable
      for updates, weight in adapters.values():
        total = lora.fuse(total, self.config, updates, weight)
      total = tensors.materialize(total)
      self._params = jax.tree.map(_beside, total, readable, base)
    self._base, self._adapters = base, adapters


def _beside(new: Any, read: jax.Array, old: jax.Array) -> jax.Array:
  """A parameter where the old one rests; the old one if it is what was read of it."""
  return old if new is read else jax.device_put(new, old.sharding)
