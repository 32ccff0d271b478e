"""The network's side of sampling: noise in, latents out, one jitted step at a time.

A video is a row of the training's kind with one clip in it: its text tokens, then its vision
tokens. The two halves of guidance stand one after the other on the batch axis.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Float32, Int, Int32, UInt32

from cogvideox_jax import sharding
from cogvideox_jax.data.packing import pack
from cogvideox_jax.diffusion.guidance import classifier_free
from cogvideox_jax.diffusion.solvers import Solver, Weights, solver_step
from cogvideox_jax.inference.inputs import Videos
from cogvideox_jax.models.backends import attention_for, filled
from cogvideox_jax.models.dit import patchify, timestep_sinusoid, unpatchify
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.layers import Attention
from cogvideox_jax.types import Example, TokenLayout
from cogvideox_jax.xla import compiler_options

Params = dict[str, Any]  # Nested by the keys of a parameter's path; see nnx.to_pure_dict.
# Which draw of a video is which: its first latents, from 1 on a solver's steps, and last the
# posterior of its image or video.
INITIAL, POSTERIOR = 0, 2**31 - 1


class Step(NamedTuple):
  """What changes from step to step: arrays, so that no number of steps compiles anew.

  They come from the host; the annotations name the shapes only.
  """

  timestep: Int32[Array, ""]
  guidance_scale: Float32[Array, ""]
  weights: Weights  # One row of a solver's.


def solver_steps(solver: Solver, guidance_scales: Float[np.ndarray, "steps"]) -> list[Step]:
  """The steps that a solver takes, in turn."""
  scales = guidance_scales.astype(np.float32)
  rows = zip(solver.timesteps, scales, zip(*solver.weights, strict=True), strict=True)
  return [Step(timestep, scale, Weights(*weights)) for timestep, scale, weights in rows]


@partial(jax.jit, static_argnames="shape")
def draw_noise(
  seeds: UInt32[Array, "b"],
  indices: UInt32[Array, "b"],  # Of each video among those of its prompt.
  draw: Int[Array, ""],  # INITIAL, or from 1 a solver's step.
  shape: tuple[int, ...],
) -> Float32[Array, "b f h w c"]:
  """Standard normal latents that depend on seed, index and draw alone: not on the batch."""

  def one(seed, index):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), draw)
    return jax.random.normal(key, shape)

  return jax.vmap(one)(seeds, indices)


def drawn(videos: Videos, draw: int, shape: tuple[int, ...]) -> Float32[Array, "b *shape"]:
  """The noise of one draw of each video."""
  return draw_noise(videos.seeds, videos.indices, draw, shape)


def denoise(
  run: Callable[..., tuple[Array, Array]],  # `denoise_step`, but for what the steps share.
  x: Float[Array, "b f h w c"],
  text: Float[Array, "halves b l t"],
  image: Float[Array, "b f h w c"] | None,
  steps: Sequence[Step],
  noise: Callable[[int, tuple[int, ...]], Float[Array, "b f h w c"]],  # Of a draw and a shape.
  on_step: Callable[[int, Array, Array], tuple[Array, Array]],  # index, x, text -> x, text.
) -> Float[Array, "b f h w c"]:
  """Takes noise through all steps. Waits for each, so that progress tells the truth."""
  previous_x0, added = jnp.zeros_like(x), jnp.zeros_like(x)
  for index, step in enumerate(steps):
    if step.weights.noise:
      added = noise(INITIAL + 1 + index, x.shape[1:])
    x, previous_x0 = jax.block_until_ready(run(x, previous_x0, added, text, image, step))
    x, text = on_step(index, x, text)
  return x


class SampledRows(NamedTuple):
  """Packed rows of one video each, as the transformer reads them."""

  vision: Float[Array, "b n p"]  # Noised patches, before an image's if the model sees one.
  text: Float[Array, "b 1 l t"]
  layout: TokenLayout


class Spread(NamedTuple):
  """How the devices share a step: rows first, then the tokens of a row. Arguments and results are
  the same on each of them."""

  attention: Attention
  rows: Callable[["SampledRows"], Any]  # Their shardings, by sharding.batch_shardings.
  tokens: Callable[[int], int]  # The length of a row for so many tokens, so that it divides.
  everywhere: NamedSharding


def spread(rows: int, devices: Sequence[Any]) -> Spread:
  """Always the same object for the same devices: programs are compiled once for each."""
  return _spread(rows, tuple(devices))


@cache
def _spread(rows: int, devices: tuple[Any, ...]) -> Spread:
  mesh, rules = sharding.mesh_of_rows(rows, devices), sharding.rules_named("fsdp")
  attend = attention_for(devices[0])
  return Spread(
    attend if len(devices) == 1 else sharding.shard_attention(attend, mesh, rules),
    partial(sharding.batch_shardings, mesh=mesh, rules=rules),
    partial(_row_tokens, mesh=mesh, rules=rules),
    sharding.replicated(mesh),
  )


def _row_tokens(tokens: int, mesh: Mesh, rules: sharding.Rules) -> int:
  """So that both the mesh and the blocks of attention divide it."""
  longer = filled(sharding.padded_tokens(tokens, mesh, rules), mesh.devices.flat[0])
  return tokens if longer == tokens else _row_tokens(longer, mesh, rules)


def jit_step(device: Any) -> Any:
  """`denoise_step` as a kind of device wants it compiled: always the same object for the same."""
  return _jit_step(tuple(compiler_options(device).items()))


@cache
def _jit_step(options: tuple[tuple[str, bool | int], ...]) -> Any:
  return jax.jit(
    denoise_step,
    static_argnames=("graphdef", "config", "spread"),
    donate_argnames=("x", "previous_x0"),
    compiler_options=dict(options),
  )


def denoise_step(
  params: Params,
  x: Float[Array, "b f h w c"],
  previous_x0: Float[Array, "b f h w c"],
  noise: Float[Array, "b f h w c"],  # Zeros for a solver that adds none.
  text: Float[Array, "halves b l t"],  # Negative, positive; the positive alone if not guided.
  image: Float[Array, "b f h w c2"] | None,  # Latents of an image, in channels behind the noise.
  step: Step,
  *,
  graphdef: nnx.GraphDef,
  config: DiTConfig,
  spread: Spread,
) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f h w c"]]:
  """Returns the latents of the next timestep, and the clean ones that the network sees now."""
  halves = text.shape[0]
  time = timestep_sinusoid(step.timestep, config.width)

  seen = x if image is None else jnp.concatenate([x, image], axis=-1)
  rows = as_rows(seen, text, config.patch, spread)
  v = nnx.merge(graphdef, params)(
    rows.vision,
    rows.text,
    jnp.broadcast_to(time, (len(rows.vision), 2, config.width)),
    rows.layout,
    attention=spread.attention,
  )
  grid = grid_of(x.shape[1:], config.patch)
  start = text.shape[2]
  v = v[:, start : start + math.prod(grid)].astype(jnp.float32)
  v = jax.vmap(partial(unpatchify, patch=config.patch, grid=grid))(v)
  v = rearrange(v, "(halves b) f h w c -> halves b f h w c", halves=halves)
  guided = classifier_free(v[0], v[1], step.guidance_scale) if halves == 2 else v[0]
  result = solver_step(step.weights, x, guided, previous_x0, noise)
  return jax.lax.with_sharding_constraint(result, spread.everywhere)


def as_rows(
  seen: Float[Array, "b f h w c"],
  text: Float[Array, "halves b l t"],
  patch: tuple[int, int, int],
  spread: Spread,
) -> SampledRows:
  """Packs each video with its text in each half of guidance, and shards the rows."""
  halves, videos = text.shape[:2]
  start = text.shape[2]
  used = start + math.prod(grid_of(seen.shape[1:], patch))
  row_tokens = spread.tokens(used)
  vision = jax.vmap(partial(patchify, patch=patch))(seen)
  vision = jnp.pad(vision, ((0, 0), (start, row_tokens - used), (0, 0)))  # 0 at text tokens.
  rows = SampledRows(
    vision=repeat(vision, "b n p -> (halves b) n p", halves=halves),
    text=rearrange(text, "halves b l t -> (halves b) 1 l t"),
    layout=jax.tree.map(
      lambda array: repeat(jnp.asarray(array), "1 ... -> r ...", r=halves * videos),
      clip_layout(seen.shape[1:], start, patch, row_tokens),
    ),
  )
  return jax.lax.with_sharding_constraint(rows, spread.rows(rows))


def grid_of(shape: tuple[int, ...], patch: tuple[int, int, int]) -> tuple[int, int, int]:
  """Patches along (t, h, w) of latents (f, h, w, ...)."""
  t, h, w = (size // step for size, step in zip(shape[:3], patch, strict=True))
  return t, h, w


def clip_layout(
  shape: tuple[int, ...],
  text_length: int,
  patch: tuple[int, int, int],
  row_tokens: int | None = None,  # By default as many as the clip has.
) -> TokenLayout:
  """The layout of a row of one clip of latents (f, h, w, ...), as training packs it."""
  nothing = np.zeros((*shape[:3], 0), np.float32)
  text = np.zeros((text_length, 0), np.float32)
  example = Example(nothing, nothing, text, "", "", num_frames=0, height=0, width=0, fps=0.0)
  used = text_length + math.prod(grid_of(shape, patch))
  return pack([example], patch=patch, row_tokens=row_tokens or used, max_clips=1).layout
