"""The programs that commands run, made for a topology from a config: no weights, no data."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from cogvideox_jax.aot import work
from cogvideox_jax.aot.topology import Topology
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import setup
from cogvideox_jax.training.programs import jit_train

# config.remat -> how often a training step runs the forward pass again: linear layers, attention.
RECOMPUTED = {"none": (0, 0), "full": (1, 1), "attention": (1, 0), "offload": (1, 0)}


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
  stage = config.stages[stage_name]
  mesh, rules = setup.make_mesh(config, stage_name, topology.devices)
  functions = setup.make_functions(config, stage_name, mesh, rules)
  batch = setup.abstract_batch(config, stage_name, mesh, rules)
  model = setup.model_config(config)
  clips = work.clips_of_row(model, stage) * stage.rows
  key = jax.eval_shape(lambda: jax.random.key(0))
  forward = work.forward_flops(model, clips)
  linear, attention = RECOMPUTED[config.remat]
  return Program(
    name="train",
    stage=stage_name,
    size=work.longest_clip(model, stage),
    parts=[Part(lambda: jit_train(functions).lower(functions.abstract, batch, key))],
    parameters=count(functions.abstract.params),
    state=functions.abstract,
    arguments=batch,
    model_flops=3 * forward,
    linear_flops=(3 + linear) * work.linear_flops(model, sum(clips)),
    attention_flops=work.attention_flops(model, clips, 2 * (1 + attention) + 7),
  )


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
