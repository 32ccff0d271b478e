"""Defines the training step and the validation step as pure functions of state and batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Key

from cogvideox_jax.diffusion.objective import (
  Denoise,
  Objective,
  TimedBatch,
  at_timestep,
  counted,
  draw_timesteps,
  loss_share,
)
from cogvideox_jax.models.dit import timestep_sinusoid
from cogvideox_jax.training.accumulation import sum_over
from cogvideox_jax.training.state import TrainState, Updates, updates_done
from cogvideox_jax.types import Batch, Params


class Network(NamedTuple):
  """A DiT without its parameters."""

  graphdef: nnx.GraphDef
  width: int  # The width of tokens, and of the timestep's sinusoids.
  attention: Callable[..., Float[Array, "b n heads head_dim"]]


class Accumulation(NamedTuple):
  """How a step divides a global batch into microbatches, which it computes one after the other."""

  split: Callable[[Any], Any]  # Arrays [rows, ...] of a tree -> [microbatches, their rows, ...].
  pin: Callable[[Params], Params]  # Gives gradients the shardings of their parameters.


def train_step(
  state: TrainState,
  batch: Batch,
  key: Key[Array, ""],
  *,
  network: Network,
  updates: Updates,
  learning_rate: optax.Schedule,
  objective: Objective,
  accumulation: Accumulation,
) -> tuple[TrainState, dict[str, Float32[Array, ""]]]:
  """Denoises one batch and moves the weights. The caller jits it and donates `state`.

  Args:
    batch: the global batch.
    key: the run's key; each step folds its number in, so that a resumed run draws the same noise.
    learning_rate: the schedule that the optimizer follows, for the metrics.

  Returns:
    The next state; loss, grad_norm (before clipping), learning_rate and the guard's metrics.
  """
  timestep_key, latent_key = jax.random.split(jax.random.fold_in(key, state.step))
  timed = draw_timesteps(objective, batch, timestep_key)
  count = counted(batch, objective.weighting)

  def loss_of(params: Params, microbatch: TimedBatch) -> Float32[Array, ""]:
    denoise = denoiser(network, params, microbatch.batch)
    return loss_share(objective, denoise, microbatch, count, latent_key)

  def gradient_of(microbatch: TimedBatch) -> tuple[Float32[Array, ""], Params]:
    share, grads = jax.value_and_grad(loss_of)(state.params, microbatch)
    return share, accumulation.pin(grads)

  total, grads = sum_over(gradient_of, accumulation.split(timed))
  metrics = {
    "loss": total,
    "grad_norm": optax.tree.norm(grads),
    "learning_rate": jnp.asarray(learning_rate(updates_done(state)), jnp.float32),
  }
  return updates.apply_unless_bad(state, grads, metrics)


def validation_step(
  params: Params,
  batch: Batch,
  key: Key[Array, ""],
  timesteps: Int[Array, "timesteps"],
  *,
  network: Network,
  objective: Objective,
  accumulation: Accumulation,
) -> Float32[Array, "timesteps"]:
  """Returns the loss of a batch at each timestep, with all clips at that timestep.

  No image is dropped. The same key gives the same noise, so that losses of different weights can be
  compared.
  """
  count, objective = counted(batch, objective.weighting), objective.with_all_images()

  def share(microbatch: TimedBatch) -> Float32[Array, ""]:
    denoise = denoiser(network, params, microbatch.batch)
    return loss_share(objective, denoise, microbatch, count, key)

  def at(timestep: Int[Array, ""]) -> Float32[Array, ""]:
    return sum_over(share, accumulation.split(at_timestep(batch, timestep)))

  return jax.lax.map(at, timesteps)


def denoiser(network: Network, params: Params, batch: Batch) -> Denoise:
  """Returns a function from noised patches and timesteps to the transformer's output.

  It passes the batch's text and layout to the transformer.

  Args:
    params: the fp32 masters; the model casts them to the type that it computes in.
  """
  model = nnx.merge(network.graphdef, params)

  def denoise(
    seen: Float[Array, "b n seen"], timesteps: Int[Array, "b s"]
  ) -> Float[Array, "b n p"]:
    return model(
      seen,
      jnp.asarray(batch.text),
      timestep_sinusoid(timesteps, network.width),
      batch.layout,
      attention=network.attention,
    )

  return denoise
