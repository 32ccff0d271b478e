"""The denoising loop: latents of noise become latents of videos, one compiled step at a time.

The two halves of guidance, negative and positive, are neighbours on the batch axis.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from cogvideox_jax.diffusion.guidance import classifier_free
from cogvideox_jax.diffusion.solvers import Solver, Weights, solver_step
from cogvideox_jax.inference.noise_draws import INITIAL
from cogvideox_jax.inference.packed_rows import pack_videos, unpack_videos
from cogvideox_jax.inference.step_sharding import StepSharding
from cogvideox_jax.models.dit import timestep_sinusoid
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.types import Params
from cogvideox_jax.xla import compiler_options


class Step(NamedTuple):
  """What changes from step to step. All are arrays, so that one program serves any steps.

  They come from the host; the annotations name the shapes only.
  """

  timestep: Int32[Array, ""]
  guidance_scale: Float32[Array, ""]
  weights: Weights  # One row of a solver's.


def solver_steps(solver: Solver, guidance_scales: Float[np.ndarray, "steps"]) -> list[Step]:
  """Lists the steps of a solver in their order."""
  scales = guidance_scales.astype(np.float32)
  rows = zip(solver.timesteps, scales, zip(*solver.weights, strict=True), strict=True)
  return [Step(timestep, scale, Weights(*weights)) for timestep, scale, weights in rows]


def denoise(
  run_step: Callable[..., tuple[Array, Array]],  # `denoise_step` of the arguments that change.
  latents: Float[Array, "b f h w c"],
  text: Float[Array, "halves b l t"],
  image_latents: Float[Array, "b f h w c"] | None,
  steps: Sequence[Step],
  draw: Callable[[int, tuple[int, ...]], Float[Array, "b f h w c"]],  # See `noise_draws`.
  on_step: Callable[[int, Array, Array], tuple[Array, Array]],  # index, latents, text -> new ones.
  interrupted: Callable[[], bool] = lambda: False,  # Whether to take no more steps.
) -> Float[Array, "b f h w c"]:
  """Takes latents through all steps. Waits for each, so that the progress shown is real."""
  previous_x0, noise = jnp.zeros_like(latents), jnp.zeros_like(latents)
  for index, step in enumerate(steps):
    if step.weights.noise:
      noise = draw(INITIAL + 1 + index, latents.shape[1:])
    latents, previous_x0 = jax.block_until_ready(
      run_step(latents, previous_x0, noise, text, image_latents, step)
    )
    latents, text = on_step(index, latents, text)
    if interrupted():
      break
  return latents


class StepProgram(NamedTuple):
  """`denoise_step` of one transformer and the devices that share it."""

  graphdef: nnx.GraphDef
  config: DiTConfig
  step_sharding: StepSharding
  device: Any  # One of the devices.

  def lower(self, params: Any, *arrays_and_step: Any) -> Any:
    """Lowers `denoise_step` for these arguments, or their shapes; `run` finds the compiled program
    in JAX's cache."""
    return jit_step(self.device).lower(params, *arrays_and_step, **self._static())

  def run(self, params: Params, *arrays_and_step: Any) -> tuple[Array, Array]:
    """Runs `denoise_step`; arrays may be on any devices, as a callback's or a caller's are."""
    *arrays, step = arrays_and_step
    arrays = jax.device_put(arrays, self.step_sharding.replicated)
    return jit_step(self.device)(params, *arrays, step, **self._static())

  def _static(self) -> dict[str, Any]:
    return {
      "graphdef": self.graphdef,
      "config": self.config,
      "step_sharding": self.step_sharding,
    }


def jit_step(device: Any) -> Any:
  """Jits `denoise_step` with the options of a kind of device.

  Returns the same object for the same kind, so that each program is compiled once.
  """
  return _jit_step(tuple(compiler_options(device).items()))


@cache
def _jit_step(options: tuple[tuple[str, bool | int], ...]) -> Any:
  return jax.jit(
    denoise_step,
    static_argnames=("graphdef", "config", "step_sharding"),
    donate_argnames=("latents", "previous_x0"),
    compiler_options=dict(options),
  )


def denoise_step(
  params: Params,
  latents: Float[Array, "b f h w c"],
  previous_x0: Float[Array, "b f h w c"],
  noise: Float[Array, "b f h w c"],  # Zeros for a solver that adds none.
  text: Float[Array, "halves b l t"],  # Negative, positive; only positive without guidance.
  image_latents: Float[Array, "b f h w c2"] | None,  # Channels that follow those of the latents.
  step: Step,
  *,
  graphdef: nnx.GraphDef,
  config: DiTConfig,
  step_sharding: StepSharding,
) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f h w c"]]:
  """Returns the latents of the next timestep, and the clean latents that this step predicts."""
  halves, _, text_tokens, _ = text.shape
  time = timestep_sinusoid(step.timestep, config.width)
  channels = latents
  if image_latents is not None:
    channels = jnp.concatenate([latents, image_latents], axis=-1)
  rows = pack_videos(channels, text, config.patch, step_sharding)
  tokens = nnx.merge(graphdef, params)(
    rows.vision,
    rows.text,
    jnp.broadcast_to(time, (len(rows.vision), 2, config.width)),
    rows.layout,
    attention=step_sharding.attention,
  )
  v = unpack_videos(tokens, halves, text_tokens, latents.shape[1:], config.patch)
  guided = classifier_free(v[0], v[1], step.guidance_scale) if halves == 2 else v[0]
  result = solver_step(step.weights, latents, guided, previous_x0, noise)
  return jax.lax.with_sharding_constraint(result, step_sharding.replicated)
