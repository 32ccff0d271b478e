"""Lowers the programs that commands run, for a topology, from a config without weights or data."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cogvideox_jax.aot import work
from cogvideox_jax.aot.program import Executable, Program, count, with_sharding
from cogvideox_jax.aot.topology import Topology
from cogvideox_jax.aot.vae_programs import coding_program, vae_train_program
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.diffusion.noise import noise_schedule
from cogvideox_jax.diffusion.solvers import SOLVERS
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference.denoising import StepProgram, solver_steps
from cogvideox_jax.inference.size import Size, check_size, default_size, latent_shape
from cogvideox_jax.inference.step_sharding import shard_step
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.rematerialization import REMAT
from cogvideox_jax.training import components, meshes, step_functions
from cogvideox_jax.training.step_functions import jit_train


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
  params = with_sharding(shapes, step_sharding.replicated, jnp.bfloat16)

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


PROGRAMS = ("train", "sample", "encode", "decode")


def make(
  config: TrainConfig | VAETrainConfig,
  topology: Topology,
  name: str,
  stage: str,
  given: dict[str, int],
) -> Program:
  """The program of a name in PROGRAMS.

  given: fields of a Size, for programs that take clips of one size; the others are the model's, or
    those of the longest and largest clips of a training of the VAE.

  Raises:
    UserError: the config has no such stage, or trains the VAE and the program is `sample`.
  """
  if isinstance(config, VAETrainConfig):
    return _make_vae(config, topology, name, stage, given)
  if name == "train":
    return train_program(config, stage_named(config, stage), topology)
  model, vae = config.model, components.vae_config(config)
  size = default_size(model, vae)._replace(**given)
  program = (
    sample_program(config, topology, size)
    if name == "sample"
    else coding_program(vae, topology, name, size, share=False)
  )
  return program._replace(stage=stage_named(config, stage))


def _make_vae(
  config: VAETrainConfig, topology: Topology, name: str, stage: str, given: dict[str, int]
) -> Program:
  if name == "sample":
    raise UserError(
      "This config trains the VAE, which samples nothing.\n"
      "Its programs are train, encode and decode; `sample` takes a config of the transformer."
    )
  if name == "train":
    return vae_train_program(config, topology, stage)
  height, width = max(config.data.sizes, key=lambda size: size[0] * size[1])
  size = Size(max(config.data.durations), height, width)._replace(**given)
  return coding_program(config.model, topology, name, size, share=True)
