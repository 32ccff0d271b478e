"""The programs that commands run, made for a topology from a config: no weights, no data."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from cogvideox_jax import sharding
from cogvideox_jax.aot import work
from cogvideox_jax.aot.topology import Topology
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import setup
from cogvideox_jax.training.programs import jit_train
from cogvideox_jax.types import Batch


class Part(NamedTuple):
  """One compiled program."""

  lower: Callable[[], Any]  # What `jax.jit(...).lower` returns.
  times: int = 1  # That it runs in one step.


class Program(NamedTuple):
  """All that is compiled for one step of a command, and what is known before it is."""

  name: str
  stage: str
  size: tuple[int, int, int]  # num_frames, height, width.
  parts: Sequence[Part]
  parameters: int  # Of the model that runs.
  state: Any  # Shapes and places of what stays on the devices: parameters, or a whole train state.
  arguments: Any  # And of what each step is given besides.
  model_flops: float  # Of one step, on all devices.
  linear_flops: float  # Of the products besides attention that run, recomputed ones included.
  attention_flops: float  # Of attention's products that run, which no kernel's cycles tell.


def train_program(config: ConfigDict, stage_name: str, topology: Topology) -> Program:
  """The training step of a stage; the very same as training/loop.py's."""
  config = for_accelerators(config, stage_name)
  stage = config.stages[stage_name]
  mesh = sharding.make_mesh(dict(config.mesh), topology.devices)
  rules = sharding.rules_named(config.sharding)
  functions = setup.make_functions(config, mesh, rules)
  batch = abstract_batch(config, stage, sharding.row_sharding(mesh, rules, stage.rows))
  model = setup.model_config(config)
  clips = work.clips_of_row(model, stage) * stage.rows
  key = jax.eval_shape(lambda: jax.random.key(0))
  forward = work.forward_flops(model, clips)
  recomputed = 1 if config.remat else 0
  return Program(
    name="train",
    stage=stage_name,
    size=work.longest_clip(model, stage),
    parts=[Part(lambda: jit_train(functions).lower(functions.abstract, batch, key))],
    parameters=count(functions.abstract.params),
    state=functions.abstract,
    arguments=batch,
    model_flops=3 * forward,
    linear_flops=(3 + recomputed) * work.linear_flops(model, sum(clips)),
    attention_flops=work.attention_flops(model, clips, 2 * (1 + recomputed) + 7),
  )


def abstract_batch(config: ConfigDict, stage: ConfigDict, place: NamedSharding) -> Batch:
  model = setup.model_config(config)
  rows, tokens, clips = stage.rows, stage.row_tokens, stage.max_clips
  patch = model.out_channels * int(np.prod(model.patch))
  frame = model.out_channels * int(np.prod(model.patch[1:]))

  def array(*shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=place)

  return Batch(
    mean=array(tokens, patch, dtype=np.float16),
    logvar=array(tokens, patch, dtype=np.float16),
    text=array(clips, model.text_length, model.text_width, dtype=np.float16),
    segment_ids=array(tokens),
    experts=array(tokens),
    coordinates=array(tokens, 3),
    grids=array(clips + 1, 3),
    extra=array(clips + 1) if model.patch[0] > 1 else None,
    image=array(tokens, 2, frame, dtype=np.float16) if model.takes_image else None,
  )


def for_accelerators(config: ConfigDict, stage_name: str) -> ConfigDict:
  """The config of one stage, with the dtype that `auto` means there: devices here are CPUs."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.stages = ConfigDict({stage_name: config.stages[stage_name]})
    if config.dtype == "auto":
      config.dtype = "bfloat16"
  return config


def stage_named(config: ConfigDict, stage: str) -> str:
  """The stage of a number, from 1, or of a name.

  Raises:
    UserError: the config has no such stage.
  """
  names = list(config.stages)
  if stage in names:
    return stage
  if stage.isdecimal() and 1 <= int(stage) <= len(names):
    return names[int(stage) - 1]
  raise UserError(
    f"There is no stage {stage!r}: the config has {len(names)}, {', '.join(names)}.\n"
    "Give a number from 1, or a name."
  )


def count(params: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def bytes_per_device(tree: Any) -> int:
  """Of arrays, or shapes, with their places."""
  return sum(
    int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


PROGRAMS = ("train", "sample", "encode", "decode")


def make(
  config: ConfigDict, topology: Topology, name: str, stage: str, size: dict[str, int]
) -> Program:
  return train_program(config, stage, topology)
