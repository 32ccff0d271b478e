"""The parts of a pipeline take turns in the devices' memory (diffusers `enable_model_cpu_offload`).

T5-XXL, a 5B transformer and the VAE at work together want more than a chip has; each alone does not
(launch/sizes.md). So parameters may rest in the host's memory, pinned, which devices copy from
directly, and lie on the devices only while a phase computes with them. They are split as they would
be there. Where an array rests it knows itself: its sharding has a memory kind.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, Sharding

from cogvideox_jax.conversion import tensors
from cogvideox_jax.conversion.tensors import Params
from cogvideox_jax.inference import out_of_memory
from cogvideox_jax.inference.denoising import spread

HOST, DEVICE = "pinned_host", "device"  # JAX's kinds of memory.


def place(
  params: Params, devices: Sequence[Any] | None, offload: bool
) -> tuple[tuple[Any, ...], Params]:
  """The devices that sample, and the parameters on them: on each wholly, or as a mesh splits them.

  With `offload`, split so in the host's memory.

  Latents go to all of these from the start: left on one, the first step's would lie elsewhere than
  those that it returns, and the program be compiled twice.
  """
  where = getattr(jax.tree.leaves(params)[0], "sharding", None)
  if devices is None and isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh):
    return tuple(where.mesh.devices.flat), to_host(params) if offload else params
  if devices is None:
    local = jax.local_devices()
    devices = local[:1] if local[0].platform == "cpu" else local
  return tuple(devices), put(params, spread(1, devices).everywhere, offload)


def put(params: Params, place: Sharding, offload: bool) -> Params:
  """Parameters, which may be lazy, in the memory of the place's devices or of their host.

  One is read after the other, so that no second copy of all is made on the way.

  Raises:
    UserError: the memory is too small.
  """
  there = place.with_memory_kind(HOST if offload else DEVICE)
  with out_of_memory.explained(out_of_memory.LOAD, [out_of_memory.OFFLOAD] * offload):
    return jax.tree.map(lambda leaf: jax.device_put(tensors.whole(leaf), there), params)


def to_host(tree: Any) -> Any:
  """Arrays in their host's memory. One that stands in several places of the tree stays one."""
  arrays = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}
  moved = {key: _moved(array, HOST) for key, array in arrays.items()}
  return jax.tree.map(lambda leaf: moved[id(leaf)], tree)


def rests_on_host(params: Params) -> bool:
  return jax.tree.leaves(params)[0].sharding.memory_kind == HOST


@contextmanager
def on_devices(params: Params) -> Iterator[Params]:
  """Parameters in the devices' memory for the while; those that rest there are left as they are.

  What was copied is freed at the end even if others still refer to it, as the traceback of an
  error does.
  """
  if not rests_on_host(params):
    yield params
    return
  copies = jax.tree.map(lambda leaf: _moved(leaf, DEVICE), params)
  try:
    yield copies
  finally:
    for copy in jax.tree.leaves(copies):
      copy.delete()


def _moved(array: jax.Array, memory: str) -> jax.Array:
  return jax.device_put(array, array.sharding.with_memory_kind(memory))
