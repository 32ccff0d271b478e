"""Decides how arrays are split over a mesh: parameter path -> logical axes -> mesh axes.

Models carry no annotation, and nothing else in the package names a mesh axis. One table serves
parameters, their moving average and the optimizer's state alike, because optax keeps the endings of
the paths: `opt_state/1/0/mu/blocks/mlp/up/kernel` is split as `params/blocks/mlp/up/kernel`.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cogvideox_jax.errors import UserError

Rules = Mapping[str, tuple[str, ...]]  # Logical axis -> the mesh axes that split it.

# If a row is split, each device's tokens are a multiple of TILE. On TPUs they are always a multiple
# of LANES, because the compiler lays tokens along the lanes of the registers.
TILE, LANES = 16, 128

MESH_AXES = ("data", "fsdp", "context", "tensor")

# The end of a parameter's path -> its logical axes. Stacked layers add an axis in front.
PARAM_AXES: dict[str, tuple[str, ...]] = {
  r"(query|key|value)/kernel": ("embed", "heads"),
  r"attention/out/kernel": ("heads", "embed"),
  r"mlp/up/kernel": ("embed", "mlp"),
  r"mlp/down/kernel": ("mlp", "embed"),
  r"(modulation|out_modulation|time_out|ofs_in|ofs_out)/kernel": ("time", "output"),
  r"(vision_in|text_in)/kernel": ("input", "embed"),
  r"(time_in|(?<!attention/)out)/kernel": ("embed", "output"),
  r"position_table": ("positions", "embed"),
  # The VAE's convolutions; those in three dimensions add an axis of time in front.
  r"(conv|conv1|conv2|conv_in)/kernel": ("height", "width", "input", "embed"),
  r"conv_out/kernel": ("height", "width", "embed", "output"),  # Frames have 3 channels.
  r"(shortcut|scale|shift)/kernel": ("input", "embed"),
  r"(bias|scale|count|step)": (),
  r"guard/(recent|skipped|in_a_row)": (),
}

# Field of a batch -> its first logical axes; the axes after these are not split. Segments are split
# by rows only, because attention compares all tokens of a row.
BATCH_AXES: dict[str, tuple[str, ...]] = {
  "vision": ("rows", "tokens"),
  "mean": ("rows", "tokens"),
  "logvar": ("rows", "tokens"),
  "text": ("rows",),
  "segment_ids": ("rows",),
  "experts": ("rows", "tokens"),
  "coordinates": ("rows", "tokens"),
  "grids": ("rows",),
  "extra": ("rows",),
  "image": ("rows", "tokens"),
}

# Devices that share a row also share the parameters: each holds a shard of them.
_FSDP: Rules = {
  "rows": ("data", "fsdp"),
  "tokens": ("context",),
  "frames": ("context",),  # The frames of the VAE's clips.
  "lines": ("tensor",),  # The rows of pixels of the VAE's clips.
  "embed": ("fsdp", "context"),
  "time": ("fsdp", "context"),
}
# `config.sharding` names one of these. A logical axis that is missing is replicated.
RULES: dict[str, Rules] = {
  "fsdp": _FSDP,
  "fsdp_tensor": {**_FSDP, "heads": ("tensor",), "mlp": ("tensor",)},
}


THREADS_PER_DEVICE = 4  # Threads that XLA has at least for each device of a CPU.


def split_cpu(devices: int) -> None:
  """Makes JAX count the CPU as several devices, unless the environment sets their number.

  XLA keeps a single core busy during much of a program. Several devices, each with a share of the
  rows, keep as many cores busy. This changes nothing on other hardware. Call it before JAX looks at
  its devices.
  """
  # By default XLA has a thread for each core. A device that waits for another one may hold a
  # thread, so with few cores none could be left for the device that is waited for.
  os.environ.setdefault("NPROC", str(max(os.cpu_count() or 1, THREADS_PER_DEVICE * devices)))
  is_set = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
  if not is_set and "JAX_NUM_CPU_DEVICES" not in os.environ:
    jax.config.update("jax_num_cpu_devices", devices)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """Returns a mesh over all devices of the job, or over those given.

  Args:
    sizes: devices along each of MESH_AXES; at most one is -1 and takes all that are left. If the
      devices belong to several slices, the sizes are those within a slice and `data` spans the
      slices, because the network between slices is slow and `data` carries only gradients.
    devices: as many as the product of the sizes, times the number of slices.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  slices = _slices(devices)
  in_slice = len(devices) // slices
  fixed = math.prod(sizes[axis] for axis in MESH_AXES if sizes[axis] > 0)
  shape = [in_slice // fixed if sizes[axis] == -1 else sizes[axis] for axis in MESH_AXES]
  if min(shape) < 1 or math.prod(shape) * slices != len(devices):
    raise UserError(
      f"config.mesh ({describe_sizes(sizes)}) does not fit the {in_slice} devices here.\n"
      "The sizes must multiply to that number; one of them may be -1, for all that are left."
    )
  types = (AxisType.Auto,) * len(MESH_AXES)
  # Two mesh axes may have to share one axis of a pod: 4 and 2 on an axis of 8 devices.
  if slices == 1:
    array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    across = [slices if axis == "data" else 1 for axis in MESH_AXES]
    array = mesh_utils.create_hybrid_device_mesh(
      shape, across, devices, allow_split_physical_axes=True
    )
  return Mesh(array, MESH_AXES, axis_types=types)


def with_context(sizes: Mapping[str, int], most: int, devices: Sequence[Any]) -> dict[str, int]:
  """Returns the sizes with `context`, if it is 0, set to the largest up to `most` that fits.

  So a stage of long rows can say how many devices may share a row, whatever the pod.
  """
  if sizes["context"]:
    return dict(sizes)
  others = math.prod(size for size in sizes.values() if size > 0)
  free = max(1, len(devices) // _slices(devices) // others)
  context = max(size for size in range(1, min(most, free) + 1) if free % size == 0)
  return {**sizes, "context": context}


def mesh_of_rows(rows: int, devices: Sequence[Any]) -> Mesh:
  """Returns a mesh over the devices, in their order, for a batch of so many rows.

  `data` is the greatest common divisor of rows and devices; `context` takes the devices that are
  left, so that several share a row.
  """
  data = math.gcd(rows, len(devices))
  shape = [{"data": data, "context": len(devices) // data}.get(axis, 1) for axis in MESH_AXES]
  types = (AxisType.Auto,) * len(MESH_AXES)
  return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=types)


def mesh_of_lines(lines: int, devices: Sequence[Any]) -> Mesh:
  """Returns a mesh over the devices, in their order, for clips of so many lines of latents.

  `tensor` is the greatest common divisor of lines and devices, which share a clip; `data` takes
  the devices that are left, each group with clips of its own.
  """
  tensor = math.gcd(lines, len(devices))
  shape = [{"data": len(devices) // tensor, "tensor": tensor}.get(axis, 1) for axis in MESH_AXES]
  types = (AxisType.Auto,) * len(MESH_AXES)
  return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=types)


def clip_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
  """Returns the sharding of clips [b, F, H, W, c], or of their latents, by clips and by height.

  The VAE's programs compute with clips so placed as they are: a convolution fetches the lines
  beside its own from other devices, and a norm sums over them.
  """
  return NamedSharding(mesh, PartitionSpec(rules["rows"], None, rules["lines"]))


def local_mesh() -> Mesh:
  """Returns a mesh over this host's devices that splits rows, for work that hosts do separately."""
  return make_mesh({axis: -1 if axis == "data" else 1 for axis in MESH_AXES}, jax.local_devices())


def share_out(params: Any) -> Any:
  """Returns parameters sharded over this host's devices, for work that hosts do separately."""
  sizes = {axis: -1 if axis == "fsdp" else 1 for axis in MESH_AXES}
  mesh = make_mesh(sizes, jax.local_devices())
  return jax.device_put(params, shardings(params, mesh, RULES["fsdp"]))


def rules_named(name: str) -> Rules:
  """Returns the row of RULES that `config.sharding` names.

  Raises:
    UserError: there is no such row; the message lists those that exist.
  """
  if name not in RULES:
    raise UserError(f"config.sharding is {name!r}; it must be one of {', '.join(RULES)}.")
  return RULES[name]


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
  """Returns the sharding of each array of parameters, an optimizer's state or a whole train state.

  Args:
    tree: arrays, or their shapes (`jax.eval_shape`).

  Raises:
    ValueError: a path matches no row of PARAM_AXES, or two.
    UserError: a size does not divide over the mesh.
  """

  def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    name = path_name(path)
    axes = [rules.get(axis, ()) for axis in _logical_axes(name, leaf.ndim)]
    for size, split in zip(leaf.shape, axes, strict=True):
      if size % shard_count(mesh, split):
        raise UserError(
          f"{name}, of shape {leaf.shape}, does not divide over the mesh "
          f"({describe_sizes(mesh.shape)}): "
          f"{size} is not a multiple of {shard_count(mesh, split)}.\n"
          f"Change the mesh along {', '.join(split)}, or config.sharding."
        )
    return NamedSharding(mesh, PartitionSpec(*(split or None for split in axes)))

  return jax.tree.map_with_path(sharding, tree)


def path_name(path: tuple[Any, ...]) -> str:
  """Returns the path of a leaf as text, its keys joined by slashes: blocks/mlp/up/kernel."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def row_sharding(mesh: Mesh, rules: Rules, rows: int) -> NamedSharding:
  """Returns the sharding of an array whose first axis is the rows of a batch; others are not split.

  Raises:
    UserError: a global batch of `rows` does not divide over the mesh.
  """
  shards = shard_count(mesh, rules["rows"])
  if rows % shards:
    raise UserError(
      f"a batch of {rows} rows does not divide over {' x '.join(rules['rows'])} of the mesh "
      f"({describe_sizes(mesh.shape)}).\nMake the stage's `rows` a multiple of {shards}, or change "
      "config.mesh."
    )
  return NamedSharding(mesh, PartitionSpec(rules["rows"]))


def batch_shardings(batch: Any, mesh: Mesh, rules: Rules) -> Any:
  """Returns the sharding of each array, or shape, of a global `types.Batch` or of sampling's rows.

  Raises:
    UserError: the rows, or the tokens of a row, do not divide over the mesh.
  """
  rows, tokens = batch.layout.segment_ids.shape
  row_sharding(mesh, rules, rows)
  check_tokens(tokens, mesh, rules)

  def sharding(path: tuple[Any, ...], _: Any) -> NamedSharding:
    axes = BATCH_AXES[path_name(path[-1:])]
    return NamedSharding(mesh, PartitionSpec(*(rules[axis] for axis in axes)))

  return jax.tree.map_with_path(sharding, batch)


def split_rows(tree: Any, microbatches: int, mesh: Mesh, rules: Rules) -> Any:
  """Turns arrays [rows, ...] into [microbatches, rows of a microbatch, ...].

  Each device divides its own rows into equal runs, and microbatch m takes the m-th run of every
  device. So no row moves to another device.
  """
  shards, free = shard_count(mesh, rules["rows"]), PartitionSpec.UNCONSTRAINED

  def split(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    x = x.reshape(shards, microbatches, -1, *x.shape[1:]).swapaxes(0, 1)
    x = x.reshape(microbatches, -1, *x.shape[3:])
    spec = PartitionSpec(None, rules["rows"], *(free,) * (x.ndim - 2))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  return jax.tree.map(split, tree)


def row_shards(mesh: Mesh, rules: Rules) -> int:
  """Returns over how many devices the rows of a batch are split."""
  return shard_count(mesh, rules["rows"])


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array of which every device holds a whole copy."""
  return NamedSharding(mesh, PartitionSpec())


def padded_tokens(tokens: int, mesh: Mesh, rules: Rules) -> int:
  """Returns the least length, padding included, at which a row of so many tokens can be split.

  Attention pads to its own blocks by itself.
  """
  shards = shard_count(mesh, rules["tokens"])
  if mesh.devices.flat[0].platform == "tpu":
    return tokens + -tokens % (LANES * shards)
  return tokens if shards == 1 else tokens + -tokens % (TILE * shards)


def check_tokens(tokens: int, mesh: Mesh, rules: Rules) -> None:
  """Raises a UserError if the tokens of a row do not divide over the mesh."""
  if tokens % shard_count(mesh, rules["tokens"]):
    raise UserError(
      f"a row of {tokens} tokens does not divide over {' x '.join(rules['tokens'])} of the mesh "
      f"({describe_sizes(mesh.shape)}).\nMake the stage's `row_tokens` "
      f"{padded_tokens(tokens, mesh, rules)}, or lower its `context`."
    )


def shard_count(mesh: Mesh, axes: tuple[str, ...]) -> int:
  """Returns into how many shards these axes of the mesh split an axis of an array."""
  return math.prod(mesh.shape[axis] for axis in axes)


def describe_sizes(sizes: Mapping[str, int]) -> str:
  """Returns the sizes of a mesh as text: data=2, fsdp=4, context=1, tensor=1."""
  return ", ".join(f"{axis}={sizes[axis]}" for axis in MESH_AXES)


def _logical_axes(name: str, ndim: int) -> list[str]:
  """Returns the logical axes of the parameter of that path, `layers` in front if it is stacked."""
  rows = [axes for ending, axes in PARAM_AXES.items() if re.search(f"(^|/){ending}$", name)]
  if len(rows) != 1:
    raise ValueError(f"{name} must match one row of sharding.PARAM_AXES, not {len(rows)}")
  axes = rows[0]
  stacked = ndim - len(axes)
  if axes and stacked not in (0, 1):
    raise ValueError(f"{name} has {ndim} axes, but sharding.PARAM_AXES says {axes}")
  return ["layers"] * stacked + list(axes)


def _slices(devices: Sequence[Any]) -> int:
  """Returns how many slices the devices belong to; devices without slices are one."""
  return len({getattr(device, "slice_index", 0) for device in devices})
