"""Where arrays live on a mesh: parameter path -> logical axes -> mesh axes.

Models carry no annotation, and nothing else in the package names a mesh axis. One table serves
parameters, their moving average and the optimizer's state alike, since optax keeps the endings
of the paths: `opt_state/1/0/mu/blocks/mlp/up/kernel` is placed as `params/blocks/mlp/up/kernel`.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cogvideox_jax.errors import UserError

Rules = Mapping[str, tuple[str, ...]]  # Logical axis -> the mesh axes that split it.

TILE = 16  # Tokens of a device's part of a row are a multiple of this,
LANES = 128  # and on TPUs of this: the compiler lays them along the registers' lanes.

MESH_AXES = ("data", "fsdp", "context", "tensor")

# The end of a path -> the logical axes of that array. Stacked layers add an axis in front.
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
}

# Fields of a batch -> their logical axes, from the first on; the axes after them are not split.
# Attention needs the segments of whole rows.
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

# Devices that share a row share the parameters, too: each holds a part.
_FSDP: Rules = {
  "rows": ("data", "fsdp"),
  "tokens": ("context",),
  "embed": ("fsdp", "context"),
  "time": ("fsdp", "context"),
}
# `config.sharding` names one of these. A logical axis that is missing is replicated.
RULES: dict[str, Rules] = {
  "fsdp": _FSDP,
  "fsdp_tensor": {**_FSDP, "heads": ("tensor",), "mlp": ("tensor",)},
}


def split_cpu(devices: int) -> None:
  """Has JAX count the CPU as several devices, unless the environment says how many it is.

  XLA keeps one core busy for much of a program; devices with a share of the rows each keep as many.
  Changes nothing for other hardware. Call it before JAX looks at its devices.
  """
  said = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
  if not said and "JAX_NUM_CPU_DEVICES" not in os.environ:
    jax.config.update("jax_num_cpu_devices", devices)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh over all devices of the job, or over those given.

  Args:
    sizes: devices along each of MESH_AXES; at most one is -1 and takes all that are left. Where
      the devices are of several slices, the sizes are those in a slice, and `data` spans the
      slices, whose network is slow: gradients are all that it carries.
    devices: as many as the product of the sizes, times the slices.

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
      f"config.mesh ({_text(sizes)}) does not fit the {in_slice} devices here.\n"
      "The sizes must multiply to that number; one of them may be -1, for all that are left."
    )
  types = (AxisType.Auto,) * len(MESH_AXES)
  # An axis of a pod may have to be shared by two of ours, such as 8 by 4 and 2.
  if slices == 1:
    array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    across = [slices if axis == "data" else 1 for axis in MESH_AXES]
    array = mesh_utils.create_hybrid_device_mesh(
      shape, across, devices, allow_split_physical_axes=True
    )
  return Mesh(array, MESH_AXES, axis_types=types)


def with_context(sizes: Mapping[str, int], most: int, devices: Sequence[Any]) -> dict[str, int]:
  """The sizes of a mesh whose `context` is 0, for the largest up to `most` that fits the devices.

  So that a stage of long rows names how many devices share one, whatever the pod.
  """
  if sizes["context"]:
    return dict(sizes)
  others = math.prod(size for size in sizes.values() if size > 0)
  free = max(1, len(devices) // _slices(devices) // others)
  context = max(size for size in range(1, min(most, free) + 1) if free % size == 0)
  return {**sizes, "context": context}


def mesh_of_rows(rows: int, devices: Sequence[Any]) -> Mesh:
  """A mesh over the devices, in their order, for so many rows: one for each as far as they divide,
  and where devices are left, several to a row."""
  data = math.gcd(rows, len(devices))
  shape = [{"data": data, "context": len(devices) // data}.get(axis, 1) for axis in MESH_AXES]
  types = (AxisType.Auto,) * len(MESH_AXES)
  return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=types)


def local_mesh() -> Mesh:
  """This host's devices alone, to share out the rows of a batch, for work that hosts do apart."""
  return make_mesh({axis: -1 if axis == "data" else 1 for axis in MESH_AXES}, jax.local_devices())


def share_out(params: Any) -> Any:
  """Parameters on this host's devices alone, each with a part, for work that hosts do apart."""
  sizes = {axis: -1 if axis == "fsdp" else 1 for axis in MESH_AXES}
  mesh = make_mesh(sizes, jax.local_devices())
  return jax.device_put(params, shardings(params, mesh, RULES["fsdp"]))


def rules_named(name: str) -> Rules:
  """The row of RULES that `config.sharding` names; else a UserError lists the names there are."""
  if name not in RULES:
    raise UserError(f"config.sharding is {name!r}; it must be one of {', '.join(RULES)}.")
  return RULES[name]


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
  """The sharding of every array of `tree`: parameters, optimizer state, or a whole train state.

  Args:
    tree: arrays, or their shapes (`jax.eval_shape`).

  Raises:
    ValueError: a path matches no row of PARAM_AXES, or two.
    UserError: a size does not divide over the mesh.
  """

  def place(path, leaf) -> NamedSharding:
    name = path_name(path)
    axes = [rules.get(axis, ()) for axis in _logical_axes(name, leaf.ndim)]
    for size, split in zip(leaf.shape, axes, strict=True):
      if size % _size(mesh, split):
        raise UserError(
          f"{name}, of shape {leaf.shape}, does not divide over the mesh ({_text(mesh.shape)}): "
          f"{size} is not a multiple of {_size(mesh, split)}.\n"
          f"Change the mesh along {', '.join(split)}, or config.sharding."
        )
    return NamedSharding(mesh, PartitionSpec(*(split or None for split in axes)))

  return jax.tree.map_with_path(place, tree)


def path_name(path: tuple[Any, ...]) -> str:
  """The path of a leaf as text, its keys joined by slashes: blocks/mlp/up/kernel."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def row_sharding(mesh: Mesh, rules: Rules, rows: int) -> NamedSharding:
  """Of arrays whose first axis is the rows of a batch; the others are not split.

  Raises:
    UserError: a global batch of `rows` does not divide over the mesh.
  """
  shards = _size(mesh, rules["rows"])
  if rows % shards:
    raise UserError(
      f"a batch of {rows} rows does not divide over {' x '.join(rules['rows'])} of the mesh "
      f"({_text(mesh.shape)}).\nMake the stage's `rows` a multiple of {shards}, or change "
      "config.mesh."
    )
  return NamedSharding(mesh, PartitionSpec(rules["rows"]))


def batch_shardings(batch: Any, mesh: Mesh, rules: Rules) -> Any:
  """The sharding of every array, or shape, of a global `types.Batch` or of sampling's rows.

  Raises:
    UserError: the rows, or the tokens of a row, do not divide over the mesh.
  """
  rows, tokens = batch.layout.segment_ids.shape
  row_sharding(mesh, rules, rows)
  _check_tokens(tokens, mesh, rules)

  def place(path: tuple[Any, ...], _: Any) -> NamedSharding:
    axes = BATCH_AXES[path_name(path[-1:])]
    return NamedSharding(mesh, PartitionSpec(*(rules[axis] for axis in axes)))

  return jax.tree.map_with_path(place, batch)


def split_rows(tree: Any, microbatches: int, mesh: Mesh, rules: Rules) -> Any:
  """Turns arrays [rows, ...] into [microbatches, rows of one, ...]; no row leaves its device.

  Microbatch m is the m-th of the equal runs of every device's rows.
  """
  shards, free = _size(mesh, rules["rows"]), PartitionSpec.UNCONSTRAINED

  def split(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    x = x.reshape(shards, microbatches, -1, *x.shape[1:]).swapaxes(0, 1)
    x = x.reshape(microbatches, -1, *x.shape[3:])
    spec = PartitionSpec(None, rules["rows"], *(free,) * (x.ndim - 2))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  return jax.tree.map(split, tree)


def row_shards(mesh: Mesh, rules: Rules) -> int:
  """Over how many devices the rows of a batch are spread."""
  return _size(mesh, rules["rows"])


def replicated(mesh: Mesh) -> NamedSharding:
  """Of an array that every device holds wholly."""
  return NamedSharding(mesh, PartitionSpec())


def shard_attention(attention: Callable[..., Any], mesh: Mesh, rules: Rules) -> Callable[..., Any]:
  """Runs `attention(q, k, v, segment_ids)` on each device's own rows and heads, over whole rows.

  Where a row's tokens are split too, the devices that share it swap tokens for heads before, and
  back after (Ulysses, arXiv:2309.14509). Heads that do not divide are filled up with zeros: 2B's 30
  become 32, which costs less than to gather all keys and values (benchmarks/attention.md).

  Raises, when it is called:
    UserError: the tokens, or the heads that `tensor` splits, do not divide over the mesh.
  """
  tokens = rules["tokens"]
  shards = _size(mesh, tokens)

  def by_head(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % shards), (0, 0)))
    return jax.lax.all_to_all(x, tokens, split_axis=2, concat_axis=1, tiled=True)

  def attend_whole(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    out = attention(by_head(q), by_head(k), by_head(v), segment_ids)
    out = jax.lax.all_to_all(out, tokens, split_axis=1, concat_axis=2, tiled=True)
    return out[:, :, : q.shape[2]]

  split = PartitionSpec(rules["rows"], tokens, rules.get("heads"))
  sharded = jax.shard_map(
    attend_whole if shards > 1 else attention,
    mesh=mesh,
    in_specs=(split, split, split, PartitionSpec(rules["rows"])),
    out_specs=split,
    check_vma=False,  # The kernel's outputs do not say over which axes they vary.
  )

  def attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    _check_tokens(q.shape[1], mesh, rules)
    _check_heads(q.shape[2], mesh, rules)
    return sharded(q, k, v, segment_ids)

  return attend


def padded_tokens(tokens: int, mesh: Mesh, rules: Rules) -> int:
  """The length to give a row of so many tokens, the rest being padding, so that it can be split.

  Attention pads to its own blocks by itself.
  """
  shards = _size(mesh, rules["tokens"])
  if mesh.devices.flat[0].platform == "tpu":
    return tokens + -tokens % (LANES * shards)
  return tokens if shards == 1 else tokens + -tokens % (TILE * shards)


def _check_tokens(tokens: int, mesh: Mesh, rules: Rules) -> None:
  if tokens % _size(mesh, rules["tokens"]):
    raise UserError(
      f"a row of {tokens} tokens does not divide over {' x '.join(rules['tokens'])} of the mesh "
      f"({_text(mesh.shape)}).\nMake the stage's `row_tokens` "
      f"{padded_tokens(tokens, mesh, rules)}, or lower its `context`."
    )


def _check_heads(heads: int, mesh: Mesh, rules: Rules) -> None:
  """Their weights may divide where they do not, but no device takes a part of a head."""
  axes = rules.get("heads", ())
  if heads % _size(mesh, axes):
    raise UserError(
      f"{heads} heads do not divide over {' x '.join(axes)} of the mesh ({_text(mesh.shape)}).\n"
      f"Change the mesh along {', '.join(axes)}, or config.sharding."
    )


def _logical_axes(name: str, ndim: int) -> list[str]:
  rows = [axes for ending, axes in PARAM_AXES.items() if re.search(f"(^|/){ending}$", name)]
  if len(rows) != 1:
    raise ValueError(f"{name} must match one row of sharding.PARAM_AXES, not {len(rows)}")
  axes = rows[0]
  stacked = ndim - len(axes)
  if axes and stacked not in (0, 1):
    raise ValueError(f"{name} has {ndim} axes, but sharding.PARAM_AXES says {axes}")
  return ["layers"] * stacked + list(axes)


def _slices(devices: Sequence[Any]) -> int:
  return len({getattr(device, "slice_index", 0) for device in devices})


def _size(mesh: Mesh, axes: tuple[str, ...]) -> int:
  return math.prod(mesh.shape[axis] for axis in axes)


def _text(sizes: Mapping[str, int]) -> str:
  return ", ".join(f"{axis}={sizes[axis]}" for axis in MESH_AXES)
