"""What is compiled for one step of a command, with shapes in place of arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cogvideox_jax.inference.size import Size


class Executable(NamedTuple):
  """One call of the compiler."""

  lower: Callable[[], Any]  # Returns what `jax.jit(...).lower` does.
  times: int = 1  # How often it runs in one step.


class Program(NamedTuple):
  """All that is compiled for one step of a command, and what is known before it is compiled."""

  name: str
  stage: str
  size: Size  # The largest clip.
  mesh: Mapping[str, int]  # Devices along each axis.
  rows: int  # Packed rows, halves of guidance, or clips of one step, on all devices.
  executables: Sequence[Executable]
  parameters: int  # How many numbers the model has.
  # Shapes with shardings: what stays on the devices (parameters, or a whole train state), and what
  # each step is given besides.
  state: Any
  arguments: Any
  # FLOPs of one step on all devices: the model's own; those of all products that run except
  # attention's; and those of attention, whose kernels the compiler gives no cycles for.
  model_flops: float
  linear_flops: float
  attention_flops: float


def count(params: Any) -> int:
  """How many numbers a tree of arrays, or shapes, has."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def bytes_per_device(tree: Any) -> int:
  """Bytes on one device of a tree of arrays, or shapes, with their shardings."""
  return sum(
    int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def with_sharding(shapes: Any, each: Any, dtype: Any) -> Any:
  """The shapes with a dtype and with `each` as the sharding of all of them."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=each), shapes)
