"""LoRA adapters of a pipeline, with the names of diffusers' `CogVideoXLoraLoaderMixin`."""

import math
from collections.abc import Iterator, Mapping, Sequence
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
    self._adapters: dict[str, tuple[LoRA, float | int]] = {}  # By name, each with its weight.
    self._enabled = True  # Whether the adapters are added.
    # The weights before `fuse_lora`, and the adapters that it unloaded.
    self._fused: tuple[Params, dict[str, tuple[LoRA, float | int]]] | None = None

  def load_lora_weights(
    self,
    path: epath.PathLike | Mapping[Any, Any],
    adapter_name: str | None = None,
    *,
    weight_name: str | None = None,
    lora_alpha: float | int | None = None,
    hotswap: bool = False,
  ) -> None:
    """Adds an adapter with weight 1.

    Args:
      path: a LoRA file, or a folder that holds one; see `conversion.lora.read`. Or a state dict.
      adapter_name: for `set_adapters`; None: "default".
      weight_name: the file's name in the folder `path`.
      lora_alpha: alpha of all modules, for a file that does not say it, as SAT's.
      hotswap: replaces the adapter of that name, which keeps its weight.

    Raises:
      UserError: it is no LoRA of this transformer; or there is an adapter of that name, or none if
        it is to be replaced.
    """
    name = "default" if adapter_name is None else adapter_name
    if isinstance(path, Mapping):
      updates = lora.from_tensors(path, lora_alpha)
    else:
      updates = lora.read(path, lora_alpha, weight_name=weight_name)
    if not hotswap:
      self.add_lora(updates, name)
      return
    self._check_names([name])
    self._apply({**self._adapters, name: (updates, self._adapters[name][1])})

  def add_lora(
    self, updates: LoRA, adapter_name: str = "default", weight: float | int = 1.0
  ) -> None:
    """Adds an adapter that was read; see `load_lora_weights`."""
    if adapter_name in self._adapters:
      raise UserError(f"There is an adapter {adapter_name!r} already; give another adapter_name.")
    self._apply({**self._adapters, adapter_name: (updates, weight)})

  def set_adapters(
    self, names: str | Sequence[str], weights: Sequence[float] | float | int = 1.0
  ) -> None:
    """Sets the weights of these adapters, one for all or one for each, and of all others to 0.

    Raises:
      UserError: there is no adapter of a name, or the weights are too few or too many.
    """
    names = [names] if isinstance(names, str) else list(names)
    each = [weights] * len(names) if isinstance(weights, int | float) else list(weights)
    self._check_names(names)
    if len(each) != len(names):
      raise UserError(f"{len(each)} weights for {len(names)} adapters: pass one, or one for each.")
    chosen = dict(zip(names, each, strict=True))
    self._apply({name: (x, chosen.get(name, 0.0)) for name, (x, _) in self._adapters.items()})

  def delete_adapters(self, names: str | Sequence[str]) -> None:
    """Removes these adapters; UserError if there is none of a name."""
    names = [names] if isinstance(names, str) else list(names)
    self._check_names(names)
    self._apply({name: kept for name, kept in self._adapters.items() if name not in names})

  def disable_lora(self) -> None:
    """Samples without adapters, until `enable_lora`; they stay loaded."""
    self._enabled = False
    self._apply(self._adapters)

  def enable_lora(self) -> None:
    """Undoes `disable_lora`."""
    self._enabled = True
    self._apply(self._adapters)

  def fuse_lora(
    self, lora_scale: float | int = 1.0, *, components: Sequence[str] = ("transformer",)
  ) -> None:
    """Adds the adapters, times lora_scale, to the weights, and unloads them.

    components: must name the transformer, which alone has adapters here.
    """
    if list(components) != ["transformer"]:
      raise UserError(f"components={components}: only the transformer has adapters.")
    adapters, base = self._adapters, self._params if self._base is None else self._base
    self._apply({name: (x, weight * lora_scale) for name, (x, weight) in adapters.items()})
    first, before = self._fused or (base, {})
    self._fused = first, {**before, **adapters}
    self._base, self._adapters = None, {}

  def unfuse_lora(self, components: Sequence[str] = ("transformer",)) -> None:
    """Undoes `fuse_lora`: the weights are as before, bit by bit, and the adapters loaded again."""
    if list(components) != ["transformer"]:
      raise UserError(f"components={components}: only the transformer has adapters.")
    if self._fused is not None:
      self._base, fused = self._fused
      self._fused = None
      self._apply({**fused, **self._adapters})

  def _check_names(self, names: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in self._adapters]:
      raise UserError(f"There is no adapter {unknown[0]!r}; loaded are {sorted(self._adapters)}.")

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
    """Removes all adapters, which restores the base weights bit by bit. Fused ones stay in them."""
    self._apply({})
    self._base = self._fused = None

  def _apply(self, adapters: dict[str, tuple[LoRA, float | int]]) -> None:
    for name, (_, weight) in adapters.items():
      if not math.isfinite(weight):
        raise UserError(f"The weight of the adapter {name!r} is {weight}: it must be finite.")
    base = self._params if self._base is None else self._base
    # On the devices, because JAX cannot slice layers of arrays that are sharded in host memory.
    with on_devices(base) as readable:
      total = readable
      for updates, weight in adapters.values() if self._enabled else ():
        total = lora.fuse(total, self.config, updates, weight)
      total = tensors.materialize(total)
      self._params = jax.tree.map(_put_back, total, readable, base)
    self._base, self._adapters = base, adapters


def _put_back(new: Any, readable: jax.Array, old: jax.Array) -> jax.Array:
  """Puts a changed parameter in the old one's memory; returns the old one if nothing changed."""
  return old if new is readable else jax.device_put(new, old.sharding)
