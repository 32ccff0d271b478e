"""Lowers the programs of the VAE: encoding and decoding of clips, and its training's step."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cogvideox_jax import sharding
from cogvideox_jax.aot import work
from cogvideox_jax.aot.program import Executable, Program, count, with_sharding
from cogvideox_jax.aot.topology import Topology
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference.size import Size, check_size
from cogvideox_jax.models import vae
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.vae_config import VAEConfig
from cogvideox_jax.training import vae_stages
from cogvideox_jax.training.step_functions import jit_train
from cogvideox_jax.training.vae_functions import abstract_frozen, make_vae_functions
from cogvideox_jax.training.vae_stages import VAEStage
from cogvideox_jax.training.vae_step import VAE_NAME

RULES = sharding.rules_named("fsdp")


def coding_program(
  sizes: VAEConfig, topology: Topology, name: str, size: Size, *, share: bool
) -> Program:
  """`encode` or `decode` of clips, by the VAE's functions of a chunk.

  A step is a whole clip: the first chunk, then the later ones, which share an executable. Each
  device holds the whole VAE.

  Args:
    share: whether devices split the height of a clip, as many as divide it. Otherwise each has a
      clip of its own.
  """
  check_size(size, sizes)
  graph, devices = graph_of(vae.VAE, sizes), topology.devices
  lines = size.height // sizes.spatial_compression if share else 1
  mesh = sharding.mesh_of_lines(lines, devices)
  clips = sharding.row_shards(mesh, RULES)
  split = sharding.clip_sharding(mesh, RULES)
  shapes = jax.eval_shape(lambda: nnx.split(vae.VAE(sizes, rngs=nnx.Rngs(0)))[1])
  params = with_sharding(shapes, sharding.replicated(mesh), jnp.float32)
  chunks = _chunks(sizes, name, size)

  def frames(number: int) -> Any:
    return jax.ShapeDtypeStruct((clips, number, *chunks.shape), jnp.float32, sharding=split)

  first, later = chunks.ends[0], chunks.ends[1] - chunks.ends[0] if len(chunks.ends) > 1 else 0
  _, kept = jax.eval_shape(partial(chunks.run, graph), params, frames(first), None)
  kept = with_sharding(kept, split, jnp.float32)
  given = [((frames(first), None), 1)]
  if later:
    given.append(((frames(later), kept), len(chunks.ends) - 1))
  flops = sum(
    work.traced_flops(jax.make_jaxpr(partial(chunks.run, graph))(params, *each)) * times
    for each, times in given
  )
  return Program(
    name=name,
    stage="",
    size=size,
    mesh=mesh.shape,
    rows=clips,
    executables=[
      Executable(partial(chunks.run.lower, graph, params, *each), times) for each, times in given
    ],
    parameters=count(params),
    state=params,
    arguments=given[-1][0],
    model_flops=flops,
    linear_flops=flops,
    attention_flops=0.0,
  )


class _Chunks(NamedTuple):
  run: Any  # The jitted function of a chunk.
  ends: Sequence[int]
  shape: tuple[int, int, int]  # Height, width and channels of what goes in.


def _chunks(sizes: VAEConfig, name: str, size: Size) -> _Chunks:
  plan, side = vae.PLANS["diffusers"], sizes.spatial_compression
  if name == "encode":
    shape = size.height, size.width, sizes.in_channels
    return _Chunks(vae.encode_chunk, plan.encode(size.num_frames), shape)
  latents = (size.num_frames - 1) // sizes.temporal_compression + 1
  shape = size.height // side, size.width // side, sizes.latent_channels
  return _Chunks(vae.decode_chunk, plan.decode(latents), shape)


def vae_train_program(config: VAETrainConfig, topology: Topology, stage: str) -> Program:
  """A training step on the longest and largest clips, as training/vae_run.py takes it.

  With a discriminator it is the step that trains it, too.

  Args:
    stage: the number of a stage, from 1, or its name.

  Raises:
    UserError: the config has no such stage, or does not fit the mesh.
  """
  chosen = _stage_named(config, stage)
  rules, settings = sharding.rules_named(config.sharding), chosen.config
  mesh = vae_stages.make_mesh(config, chosen, topology.devices)
  functions = make_vae_functions(
    config,
    chosen,
    mesh,
    rules,
    abstract_frozen(config.loss),
    adversarial=vae_stages.has_adversary(config),
  )
  height, width = max(settings.sizes, key=math.prod)
  size = Size(max(settings.durations), height, width)
  multiple = settings.batch_multiple
  clips = max(1, settings.frames // size.num_frames // multiple) * multiple
  shape = clips, *size, config.model.in_channels
  split = sharding.row_sharding(mesh, rules, clips)
  batch = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=split)
  key = jax.eval_shape(lambda: jax.random.key(0))
  flops = work.traced_flops(jax.make_jaxpr(functions.train)(functions.abstract, batch, key))
  return Program(
    name="train",
    stage=chosen.stage.name if config.stages else "",
    size=size,
    mesh=mesh.shape,
    rows=clips,
    executables=[Executable(lambda: jit_train(functions).lower(functions.abstract, batch, key))],
    parameters=count(functions.abstract.params[VAE_NAME]),
    state=functions.abstract,
    arguments=batch,
    model_flops=flops,
    linear_flops=flops,
    attention_flops=0.0,
  )


def _stage_named(config: VAETrainConfig, stage: str) -> VAEStage:
  plan = vae_stages.plan(config)
  names = [one.stage.name for one in plan]
  if stage in names:
    return plan[names.index(stage)]
  if stage.isdecimal() and 1 <= int(stage) <= len(plan):
    return plan[int(stage) - 1]
  raise UserError(
    f"There is no stage {stage!r}: the config has {len(names)}, {', '.join(names)}.\n"
    "Give a number from 1, or a name."
  )
