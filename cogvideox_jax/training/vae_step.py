"""Defines the VAE's training steps as pure functions of state, frames and key.

There are two. `reconstruct_step` minimizes what `vae_losses.py` says of pixels and latents.
`adversarial_step` adds a discriminator's judgement, and trains the discriminator on the same
reconstructions. Which one is taken at a step follows from the step's number (`vae_functions.py`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from cogvideox_jax.models import vae
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.sharded_vae import SharedClips
from cogvideox_jax.training.accumulation import sum_over
from cogvideox_jax.training.pixels import to_float
from cogvideox_jax.training.state import TrainState, Updates
from cogvideox_jax.training.vae_losses import (
  Judge,
  LossWeights,
  Metrics,
  Perceptual,
  discriminator_loss,
  divergence,
  drawn_window,
  generator_loss,
  posterior_noise,
  psnr,
  reconstruction_loss,
)
from cogvideox_jax.types import Params

VAE_NAME, DISCRIMINATOR = "vae", "discriminator"  # The subtrees of a state's parameters.
# The adaptive weight's bounds, and what is added to its denominator (arXiv:2012.09841 and its
# code).
MOST_WEIGHT, SMALLEST_NORM = 1e4, 1e-4


class Network(NamedTuple):
  """The networks without their parameters, and how a step shards and divides what it computes."""

  graphdef: nnx.GraphDef
  # Gives every device all parameters, because each computes whole clips and splits no channel.
  gather: Callable[[Any], Any]
  pin: Callable[[Params], Params]  # Gives gradients, by network, their parameters' shardings.
  split: Callable[[Any], Any]  # Arrays [clips, ...] of a tree -> [microbatches, their clips, ...].
  share: Callable[[int], SharedClips]  # Says how devices share clips of so many frames.
  perceptual: Perceptual | None = None


class Adversary(NamedTuple):
  """The discriminator without its parameters, and what weighs it."""

  graphdef: nnx.GraphDef
  weight: float  # Multiplies the generator's term; if adaptive, the ratio of gradient norms.
  adaptive: bool
  r1: float
  frames: int  # Successive frames of a clip that it sees; 0: all of them.


class Reconstruction(NamedTuple):
  """What the VAE makes of a batch; also the gradients of a loss with respect to that."""

  restored: Float[Array, "b S H W 3"]
  mean: Float[Array, "b s h w c"]
  logvar: Float[Array, "b s h w c"]


class Microbatch(NamedTuple):
  """Some clips of a batch, and the keys that draw for them."""

  frames: UInt8[Array, "b F H W 3"]
  keys: Key[Array, " b"]


class Sums(NamedTuple):
  """What the microbatches of a step add up to."""

  metrics: Metrics
  grads: Params  # The gradients of each subtree that learns.
  adversarial: Params  # The VAE's gradient of the adversarial term alone, if it is weighed last.


def reconstruct(
  network: Network,
  params: Params,
  clips: SharedClips,
  frames: Float[Array, "b S H W 3"],
  keys: Key[Array, " b"],
) -> Reconstruction:
  """Encodes clips, samples the posterior with the clips' keys, and decodes the sample."""
  model: VAE = nnx.merge(network.graphdef, network.gather(params))
  mean, logvar = clips.encode(model, frames)
  noise = posterior_noise(keys, (clips.encoding.latents, *mean.shape[2:]))
  z = vae.sample_posterior(mean, logvar, clips.spread_latents(noise))
  return Reconstruction(clips.decode(model, z), mean, logvar)


def vae_loss(
  clips: SharedClips,
  made: Reconstruction,
  frames: Float[Array, "b S H W 3"],
  keys: Key[Array, " b"],
  weights: LossWeights,
  perceptual: Perceptual | None = None,
  network: Params | None = None,
) -> tuple[Float[Array, ""], Metrics]:
  """Returns the loss without the adversarial term, and its terms.

  Args:
    network: the parameters of the perceptual distance.

  Returns:
    The loss; `loss`, `l1`, `mse`, `kl` and maybe `lpips`, means over the clips.
  """
  loss, metrics = reconstruction_loss(
    clips, made.restored, frames, keys, weights, perceptual, network or {}
  )
  metrics["kl"] = divergence(clips, made.mean, made.logvar)
  loss += weights.kl * metrics["kl"]
  return loss, {"loss": loss, **metrics}


def reconstruct_step(
  state: TrainState,
  frames: UInt8[Array, "b F H W 3"],
  key: Key[Array, ""],
  *,
  network: Network,
  updates: Updates,
  weights: LossWeights,
) -> tuple[TrainState, Metrics]:
  """Reconstructs one batch and moves the VAE's weights; a discriminator, if any, stays.

  A pure function, as training.step.train_step.

  Args:
    key: of the run; the number of the step is folded in.

  Returns:
    The next state; the terms of the loss, psnr in dB, grad_norm before clipping, and the guard's
    metrics.
  """
  frozen = network.gather(state.frozen)

  def gradients(microbatch: Microbatch) -> Sums:
    pull, *_, cotangent, metrics = _forward(
      network, state.params[VAE_NAME], microbatch, weights, frozen
    )
    return Sums(metrics, network.pin({VAE_NAME: pull(cotangent)}), {})

  sums = _mean_over(gradients, network, frames, _keys_of(key, state, frames))
  return updates.apply_unless_bad(state, sums.grads, _described(sums.metrics, sums.grads))


def adversarial_step(
  state: TrainState,
  frames: UInt8[Array, "b F H W 3"],
  key: Key[Array, ""],
  *,
  network: Network,
  updates: Updates,
  weights: LossWeights,
  adversary: Adversary,
) -> tuple[TrainState, Metrics]:
  """Moves the VAE against the discriminator, and the discriminator against the VAE.

  Both gradients are of the same reconstructions, with the parameters before the step.

  Returns:
    As `reconstruct_step`; also the generator's term `generator` and its `generator_weight`, the
    discriminator's loss `discriminator` with the metrics of `discriminator_loss`, and
    `discriminator_grad_norm`.
  """
  frozen = network.gather(state.frozen)

  def gradients(microbatch: Microbatch) -> Sums:
    pull, restored, cotangent, metrics = _forward(
      network, state.params[VAE_NAME], microbatch, weights, frozen
    )
    clips = network.share(microbatch.frames.shape[1])

    def window(frames: Float[Array, "b F H W 3"]) -> Float[Array, "b f H W 3"]:
      return drawn_window(frames, microbatch.keys, adversary.frames)

    generator, direction = jax.value_and_grad(
      lambda restored: generator_loss(
        _judge(network, adversary, state.params[DISCRIMINATOR]), window(clips.whole(restored))
      )
    )(restored)
    seen = window(to_float(microbatch.frames)), window(clips.whole(restored))
    (loss, judged), of_discriminator = jax.value_and_grad(
      lambda params: discriminator_loss(_judge(network, adversary, params), *seen, adversary.r1),
      has_aux=True,
    )(state.params[DISCRIMINATOR])
    metrics |= {"generator": generator, "discriminator": loss, **judged}
    if adversary.adaptive:
      zero = jax.tree.map(jnp.zeros_like, cotangent)
      adversarial = network.pin({VAE_NAME: pull(zero._replace(restored=direction))})
    else:
      cotangent = cotangent._replace(restored=cotangent.restored + adversary.weight * direction)
      adversarial = {}
    grads = {VAE_NAME: pull(cotangent), DISCRIMINATOR: of_discriminator}
    return Sums(metrics, network.pin(grads), adversarial)

  sums = _mean_over(gradients, network, frames, _keys_of(key, state, frames))
  weight, grads = weighed(sums, adversary)
  metrics = _described(sums.metrics, grads)
  metrics["generator_weight"] = weight
  metrics["loss"] += weight * metrics["generator"]
  metrics["discriminator_grad_norm"] = optax.tree.norm(grads[DISCRIMINATOR])
  return updates.apply_unless_bad(state, grads, metrics)


def validation_metrics(
  params: Params,
  frames: UInt8[Array, "b F H W 3"],
  key: Key[Array, ""],
  frozen: Params,
  *,
  network: Network,
  weights: LossWeights,
) -> Metrics:
  """Returns the terms of the loss of one batch, and its psnr. The same key draws the same sample.

  Args:
    params: the VAE's.
    frozen: the parameters of the perceptual distance.
  """
  keys, perceptual = jax.random.split(key, len(frames)), network.perceptual
  frozen = network.gather(frozen)

  def measure(microbatch: Microbatch) -> Metrics:
    clips = network.share(microbatch.frames.shape[1])
    frames = clips.spread(to_float(microbatch.frames))
    made = reconstruct(network, params, clips, frames, microbatch.keys)
    return vae_loss(clips, made, frames, microbatch.keys, weights, perceptual, frozen)[1]

  return _described(_mean_over(measure, network, frames, keys))


class _Forward(NamedTuple):
  """A reconstruction on its way to the gradient of the parameters."""

  pull: Callable[[Reconstruction], Params]  # Takes the gradient with respect to what was made.
  restored: Float[Array, "b S H W 3"]
  cotangent: Reconstruction  # The gradient of `vae_loss` with respect to what was made.
  metrics: Metrics  # Those of `vae_loss`.


def _forward(
  network: Network,
  params: Params,
  microbatch: Microbatch,
  weights: LossWeights,
  frozen: Params,
) -> _Forward:
  """Reconstructs clips, and finds the gradient of their loss with respect to what was made."""
  clips, keys = network.share(microbatch.frames.shape[1]), microbatch.keys
  frames = clips.spread(to_float(microbatch.frames))
  made, pull = jax.vjp(lambda params: reconstruct(network, params, clips, frames, keys), params)
  cotangent, metrics = jax.grad(
    lambda made: vae_loss(clips, made, frames, keys, weights, network.perceptual, frozen),
    has_aux=True,
  )(made)
  return _Forward(lambda cotangent: pull(cotangent)[0], made.restored, cotangent, metrics)


def _judge(network: Network, adversary: Adversary, params: Params) -> Judge:
  """Returns the discriminator with these parameters."""
  return nnx.merge(adversary.graphdef, network.gather(params))


def weighed(sums: Sums, adversary: Adversary) -> tuple[Float[Array, ""], Params]:
  """Returns the weight of the adversarial term, and the gradients with it counted.

  The adaptive weight makes the adversarial gradient of the decoder's last layer as long as that of
  the other terms, times the config's weight (arXiv:2012.09841). It is that of the whole batch.
  """
  if not adversary.adaptive:
    return jnp.float32(adversary.weight), sums.grads
  others, adversarial = sums.grads[VAE_NAME], sums.adversarial[VAE_NAME]
  ratio = _last_layer_norm(others) / (_last_layer_norm(adversarial) + SMALLEST_NORM)
  weight = adversary.weight * jnp.clip(ratio, 0.0, MOST_WEIGHT)
  total = jax.tree.map(lambda x, y: x + weight * y, others, adversarial)
  return weight, {**sums.grads, VAE_NAME: total}


def _last_layer_norm(grads: Params) -> Float[Array, ""]:
  return jnp.linalg.norm(grads["decoder"]["conv_out"]["kernel"].ravel())


def _keys_of(key: Key[Array, ""], state: TrainState, frames: Array) -> Key[Array, " b"]:
  """Returns a key for each clip, which follow from the run's key and the number of the step."""
  return jax.random.split(jax.random.fold_in(key, state.step), len(frames))


def _mean_over(
  function: Callable[[Microbatch], Any],
  network: Network,
  frames: UInt8[Array, "b F H W 3"],
  keys: Key[Array, " b"],
) -> Any:
  """Returns the mean of a function over the microbatches of a batch."""
  microbatches = network.split(Microbatch(frames, keys))
  count = len(microbatches.frames)
  total = sum_over(function, microbatches)
  return total if count == 1 else jax.tree.map(lambda x: x / count, total)


def _described(metrics: Metrics, grads: Params | None = None) -> Metrics:
  """Returns the metrics with the PSNR for the squared error, and the norm of the VAE's gradient."""
  found = {name: x for name, x in metrics.items() if name != "mse"}
  found["psnr"] = psnr(metrics["mse"])
  if grads is not None:
    found["grad_norm"] = optax.tree.norm(grads[VAE_NAME])
  return found


class LatentSums(NamedTuple):
  """Expected sums over the latents of some clips, when they are sampled from the posterior."""

  size: int  # How many numbers are summed.
  total: Float[Array, ""]
  squares: Float[Array, ""]


def latent_sums(
  params: Params, frames: UInt8[Array, "b F H W 3"], *, graphdef: nnx.GraphDef
) -> LatentSums:
  """Returns the sums over the latents of one batch."""
  mean, logvar = vae.encode(nnx.merge(graphdef, params), to_float(frames))
  return LatentSums(mean.size, mean.sum(), (mean**2 + jnp.exp(logvar)).sum())
