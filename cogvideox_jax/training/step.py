"""One update of the weights, and the loss that is watched: pure functions of state and batch."""

from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Key

from cogvideox_jax.diffusion.latents import LatentConfig
from cogvideox_jax.diffusion.loss import Denoise, diffusion_loss, validation_loss
from cogvideox_jax.diffusion.noise import NoiseSchedule
from cogvideox_jax.models.dit import timestep_sinusoid
from cogvideox_jax.training import optimizer
from cogvideox_jax.training.state import Params, TrainState
from cogvideox_jax.types import Batch


class Network(NamedTuple):
  """A DiT without its parameters."""

  graphdef: nnx.GraphDef
  width: int  # Of the tokens, and of the timestep's sinusoids.
  attention: Callable[..., Float[Array, "b n heads head_dim"]]


def train_step(
  state: TrainState,
  batch: Batch,
  key: Key[Array, ""],
  *,
  network: Network,
  tx: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  schedule: NoiseSchedule,
  latents: LatentConfig,
  ema_decay: float,
  explicit_uniform: bool,
) -> tuple[TrainState, dict[str, Float32[Array, ""]]]:
  """Denoises one batch and moves the weights. The loop jits it and donates `state`.

  Args:
    batch: the global batch.
    key: of the run; each step folds its number in, so that a resumed run draws the same noise.
    learning_rate: what `tx` follows, for the metrics.

  Returns:
    The next state; loss, grad_norm (before clipping) and learning_rate.
  """
  key = jax.random.fold_in(key, state.step)

  def loss_of(params: Params) -> Float32[Array, ""]:
    return diffusion_loss(
      denoiser(network, params, batch),
      batch,
      schedule,
      key,
      latents=latents,
      explicit_uniform=explicit_uniform,
    )

  loss, grads = jax.value_and_grad(loss_of)(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = cast(Params, optax.apply_updates(state.params, updates))
  ema = optimizer.average(state.ema, params, state.step, ema_decay)
  metrics = {
    "loss": loss,
    "grad_norm": optax.tree.norm(grads),
    "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
  }
  return TrainState(state.step + 1, params, opt_state, ema), metrics


def validation_step(
  params: Params,
  batch: Batch,
  key: Key[Array, ""],
  timesteps: Int[Array, "timesteps"],
  *,
  network: Network,
  schedule: NoiseSchedule,
  latents: LatentConfig,
) -> Float32[Array, "timesteps"]:
  """The loss of a batch with all its clips at each of the timesteps in turn, on fixed noise."""
  denoise = denoiser(network, params, batch)

  def at(timestep: Int[Array, ""]) -> Float32[Array, ""]:
    return validation_loss(denoise, batch, schedule, key, timestep, latents=latents)

  return jax.lax.map(at, timesteps)


def denoiser(network: Network, params: Params, batch: Batch) -> Denoise:
  """The transformer as the loss sees it: what it is told of the batch besides vision patches.

  Parameters are the fp32 masters; the model casts them to the type it computes in.
  """
  model = nnx.merge(network.graphdef, params)

  def denoise(
    seen: Float[Array, "b n seen"], timesteps: Int[Array, "b s"]
  ) -> Float[Array, "b n p"]:
    return model(
      seen,
      jnp.asarray(batch.text),
      timestep_sinusoid(timesteps, network.width),
      batch.segment_ids,
      batch.experts,
      batch.coordinates,
      batch.grids,
      attention=network.attention,
    )

  return denoise
