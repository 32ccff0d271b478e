"""Parameters that wait in the host's memory (diffusers `enable_model_cpu_offload`).

T5-XXL, a 5B transformer and the VAE together need more memory than a chip has; each alone fits
(launch/sizes.md). So a pipeline may keep its parameters in pinned host memory, from which devices
copy directly, and put a component's parameters on the devices only for the phase that uses them.
They are split among the devices in the same way in both memories. The memory kind of an array's
sharding tells where it is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from cogvideox_jax.conversion import numbers, tensors
from cogvideox_jax.inference import out_of_memory
from cogvideox_jax.inference.step_sharding import shard_step
from cogvideox_jax.sharding import path_name
from cogvideox_jax.types import Params

HOST, DEVICE = "pinned_host", "device"  # JAX's kinds of memory.


def put_transformer(
  params: Params, devices: Sequence[Any] | None, on_host: bool
) -> tuple[tuple[Any, ...], Params]:
  """Returns the devices that sample, and the parameters in their memory or in their host's.

  Parameters that are on a mesh keep their shardings, and its devices sample. Others are copied
  whole to each device.

  Args:
    devices: by default those of the parameters' mesh, else all accelerators of this host, or the
      first CPU.
  """
  current = getattr(jax.tree.leaves(params)[0], "sharding", None)
  if devices is None and isinstance(current, NamedSharding) and isinstance(current.mesh, Mesh):
    return tuple(current.mesh.devices.flat), to_host(params) if on_host else params
  if devices is None:
    local = jax.local_devices()
    devices = local[:1] if local[0].platform == "cpu" else local
  return tuple(devices), put(params, shard_step(1, devices).replicated, on_host)


def put(params: Params, sharding: Sharding, on_host: bool) -> Params:
  """Puts parameters in the memory of the sharding's devices, or in that of their host.

  Lazy parameters are read one after the other, so that there is never a second copy of all.

  Raises:
    UserError: the memory is too small.
  """
  target = sharding.with_memory_kind(HOST if on_host else DEVICE)
  with out_of_memory.explained(out_of_memory.LOAD, [out_of_memory.OFFLOAD] * on_host):
    return jax.tree.map_with_path(
      lambda path, leaf: jax.device_put(_checked(path, tensors.whole(leaf)), target), params
    )


def _checked(path: Any, leaf: Any) -> Any:
  """A parameter that comes from a file; UserError if it has numbers that are not finite."""
  if isinstance(leaf, np.ndarray):
    numbers.check_finite(f"The parameter {path_name(path)}", leaf)
  return leaf


def to_host(tree: Any) -> Any:
  """Moves arrays to their host's memory. An array that the tree holds twice is moved once."""
  arrays = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}
  moved = {key: _moved(array, HOST) for key, array in arrays.items()}
  return jax.tree.map(lambda leaf: moved[id(leaf)], tree)


def is_on_host(params: Params) -> bool:
  return jax.tree.leaves(params)[0].sharding.memory_kind == HOST


@contextmanager
def on_devices(params: Params) -> Iterator[Params]:
  """Yields the parameters in the devices' memory; those that are there already are not copied.

  Copies are freed at the end even if others still refer to them, as the traceback of an error does.
  """
  if not is_on_host(params):
    yield params
    return
  copies = jax.tree.map(lambda leaf: _moved(leaf, DEVICE), params)
  try:
    yield copies
  finally:
    for copy in jax.tree.leaves(copies):
      copy.delete()


@contextmanager
def loaded_for(phase: str, params: Params, *, tiling: bool = False) -> Iterator[Params]:
  """Yields a component's parameters on the devices for one phase of sampling.

  Args:
    phase: a key of `out_of_memory.REMEDIES`.
    tiling: whether the VAE works in tiles already.

  Raises:
    UserError: the devices' memory is too small; it names the remedies that are not in use.
  """
  remedies = {out_of_memory.OFFLOAD: is_on_host(params), out_of_memory.TILING: tiling}
  in_use = [remedy for remedy, used in remedies.items() if used]
  with out_of_memory.explained(phase, in_use), on_devices(params) as ready:
    yield ready


def _moved(array: jax.Array, memory: str) -> jax.Array:
  return jax.device_put(array, array.sharding.with_memory_kind(memory))
