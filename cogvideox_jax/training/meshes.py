"""Makes the mesh of a stage, and the shapes and shardings of its batches."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cogvideox_jax import sharding
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.types import Batch


def make_mesh(
  config: TrainConfig, stage: str, devices: Sequence[Any] | None = None
) -> tuple[Mesh, sharding.Rules]:
  """Returns the mesh of a stage, over all devices of the job or those given, and its rules."""
  devices = jax.devices() if devices is None else devices
  sizes = sharding.with_context(
    dataclasses.asdict(config.mesh), config.stages[stage].context, devices
  )
  return sharding.make_mesh(sizes, devices), sharding.rules_named(config.sharding)


def abstract_batch(config: TrainConfig, stage: str, mesh: Mesh, rules: sharding.Rules) -> Batch:
  """Returns the shapes, types and shardings of a stage's global batch.

  They are those that the loader gives for clips that `encode` made.
  """
  model, sizes = config.model, config.stages[stage]
  rows, tokens, clips = sizes.rows, sizes.row_tokens, sizes.max_clips
  frame_width = model.out_channels * math.prod(model.patch[1:])

  def array(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct((rows, *shape), dtype)

  batch = Batch(
    mean=array(jnp.float16, tokens, model.patch[0] * frame_width),
    logvar=array(jnp.float16, tokens, model.patch[0] * frame_width),
    text=array(jnp.bfloat16, clips, model.text_length, model.text_width),
    segment_ids=array(jnp.int32, tokens),
    experts=array(jnp.int32, tokens),
    coordinates=array(jnp.int32, tokens, 3),
    grids=array(jnp.int32, clips + 1, 3),
    extra=array(jnp.int32, clips + 1) if model.patch[0] > 1 else None,
    image=array(jnp.float16, tokens, 2, frame_width) if model.takes_image else None,
  )
  return jax.tree.map(
    lambda x, split: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split),
    batch,
    sharding.batch_shardings(batch, mesh, rules),
  )
