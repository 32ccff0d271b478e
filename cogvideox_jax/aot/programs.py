"""Lowers the programs that commands run, for a topology, from a config without weights or data."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cogvideox_jax import frozen_networks, sharding
from cogvideox_jax.aot import work
from cogvideox_jax.aot.topology import Topology
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.diffusion.noise import noise_schedule
from cogvideox_jax.diffusion.solvers import SOLVERS
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference.denoising import StepProgram, solver_steps
from cogvideox_jax.inference.size import Size, check_size, latent_shape
from cogvideox_jax.inference.step_sharding import shard_step
from cogvideox_jax.models import vae
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.rematerialization import REMAT
from cogvideox_jax.training import components, meshes, step_functions
from cogvideox_jax.training.step_functions import jit_train


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


def train_program(config: TrainConfig, stage_name: str, topology: Topology) -> Program:
  """The training step of a stage: the function that training/transformer_run.py runs."""
  stage = config.stages[stage_name]
  mesh, rules = meshes.make_mesh(config, stage_name, topology.devices)
  functions = step_functions.make_functions(config, stage_name, mesh, rules)
  batch = meshes.abstract_batch(config, stage_name, mesh, rules)
  model = config.model
  clips = work.clips_of_row(model, stage) * stage.rows
  key = jax.eval_shape(lambda: jax.random.key(0))
  forward = work.forward_flops(model, clips)
  again = REMAT[config.remat]
  products = work.FORWARD_PRODUCTS * (1 + again.attention) + work.BACKWARD_PRODUCTS
  return Program(
    name="train",
    stage=stage_name,
    size=work.longest_clip(model, stage),
    mesh=mesh.shape,
    rows=stage.rows,
    executables=[Executable(lambda: jit_train(functions).lower(functions.abstract, batch, key))],
    parameters=count(functions.abstract.params),
    state=functions.abstract,
    arguments=batch,
    model_flops=3 * forward,
    linear_flops=(3 + again.linear) * work.linear_flops(model, sum(clips)),
    attention_flops=work.attention_flops(model, clips, products),
  )


def stage_named(config: TrainConfig, stage: str) -> str:
  """The name of a stage, which is given by its number, from 1, or by its name.

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
  """How many numbers a tree of arrays, or shapes, has."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def bytes_per_device(tree: Any) -> int:
  """Bytes on one device of a tree of arrays, or shapes, with their shardings."""
  return sum(
    int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def sample_program(config: TrainConfig, topology: Topology, size: Size) -> Program:
  """One step of sampling one video, with guidance: the function that inference/pipeline.py runs.

  Each device holds all parameters, in bfloat16, as most published ones are.
  """
  model, vae = config.model, components.vae_config(config)
  check_size(size, vae, model.patch)
  rows = 2  # The halves of guidance.
  step_sharding = shard_step(rows, topology.devices)
  shapes = jax.eval_shape(
    lambda: nnx.to_pure_dict(nnx.state(DiT(model, rngs=nnx.Rngs(0)), nnx.Param))
  )
  params = _with_sharding(shapes, step_sharding.replicated, jnp.bfloat16)

  def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=step_sharding.replicated)

  shape, _ = latent_shape(size, model, vae)
  x, text = array(1, *shape), array(rows, 1, model.text_length, model.text_width)
  image = array(1, *shape) if model.takes_image else None
  schedule = noise_schedule(config.noise)
  steps = solver_steps(SOLVERS["ddim"](schedule, 50, 0), np.full(50, 6.0))
  arguments = (x, x, x, text, image)

  graphdef = graph_of(DiT, model, dtype=jnp.bfloat16)
  program = StepProgram(graphdef, model, step_sharding, topology.devices[0])

  clips = [work.clip_tokens(model, *size)] * rows
  return Program(
    name="sample",
    stage="",
    size=size,
    mesh=step_sharding.replicated.mesh.shape,
    rows=rows,
    executables=[Executable(partial(program.lower, params, *arguments, steps[0]))],
    parameters=count(params),
    state=params,
    arguments=arguments,
    model_flops=work.forward_flops(model, clips),
    linear_flops=work.linear_flops(model, sum(clips)),
    attention_flops=work.attention_flops(model, clips, work.FORWARD_PRODUCTS),
  )


def vae_program(config: TrainConfig, topology: Topology, name: str, size: Size) -> Program:
  """`encode` or `decode` of one clip on each device, by the VAE's functions of a chunk.

  A step is a whole clip: the first chunk, then the later ones, which share an executable. Each
  device holds the whole VAE.
  """
  sizes = components.vae_config(config)
  check_size(size, sizes)
  graph = graph_of(vae.VAE, sizes)
  mesh = sharding.mesh_of_rows(len(topology.devices), topology.devices)
  rules = frozen_networks.RULES
  shapes = jax.eval_shape(lambda: nnx.split(vae.VAE(sizes, rngs=nnx.Rngs(0)))[1])
  params = _with_sharding(shapes, sharding.replicated(mesh), jnp.float32)
  rows = sharding.row_sharding(mesh, rules, len(topology.devices))
  latents = (size.num_frames - 1) // sizes.temporal_compression + 1
  side = sizes.spatial_compression
  plan, run = vae.PLANS["diffusers"], vae.encode_chunk
  ends, shape = plan.encode(size.num_frames), (size.height, size.width, sizes.in_channels)
  if name == "decode":
    run, ends = vae.decode_chunk, plan.decode(latents)
    shape = (size.height // side, size.width // side, sizes.latent_channels)

  def chunk(frames: int) -> Any:
    whole = (len(topology.devices), frames, *shape)
    return jax.ShapeDtypeStruct(whole, jnp.float32, sharding=rows)

  first, later = ends[0], ends[1] - ends[0] if len(ends) > 1 else 0
  _, kept = jax.eval_shape(partial(run, graph), params, chunk(first), None)
  kept = _with_sharding(kept, rows, jnp.float32)
  chunks = [((chunk(first), None), 1)]
  if later:
    chunks.append(((chunk(later), kept), len(ends) - 1))
  flops = sum(
    work.traced_flops(jax.make_jaxpr(partial(run, graph))(params, *given)) * times
    for given, times in chunks
  )
  return Program(
    name=name,
    stage="",
    size=size,
    mesh=mesh.shape,
    rows=len(topology.devices),
    executables=[
      Executable(partial(run.lower, graph, params, *given), times) for given, times in chunks
    ],
    parameters=count(params),
    state=params,
    arguments=chunks[-1][0],
    model_flops=flops,
    linear_flops=flops,
    attention_flops=0.0,
  )


def _with_sharding(shapes: Any, each: Any, dtype: Any) -> Any:
  """The shapes with a dtype and with `each` as the sharding of all of them."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=each), shapes)


PROGRAMS = ("train", "sample", "encode", "decode")


def make(
  config: TrainConfig, topology: Topology, name: str, stage: str, given: dict[str, int]
) -> Program:
  """The program of a name in PROGRAMS.

  given: fields of a Size, for programs that take clips of one size; the others are the model's.
  """
  if name == "train":
    return train_program(config, stage_named(config, stage), topology)
  model, scale = config.model, components.vae_config(config).spatial_compression
  default = Size(model.sample_frames, model.sample_height * scale, model.sample_width * scale)
  size = default._replace(**given)
  program = (
    sample_program(config, topology, size)
    if name == "sample"
    else vae_program(config, topology, name, size)
  )
  return program._replace(stage=stage_named(config, stage))
