"""Defines the VAE's loss and training step. Clips are reconstructed in chunks, as in sampling.

The loss sums L1, L2 and the divergence of the latents from the unit normal (CogVideoX,
arXiv:2408.06072, section 2.1 and its first version). The paper's perceptual and adversarial terms
are left out.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from cogvideox_jax.models import vae
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.training.pixels import to_float
from cogvideox_jax.training.state import TrainState, Updates
from cogvideox_jax.types import Params

Metrics = dict[str, Float[Array, ""]]
SMALLEST_ERROR = 1e-10  # A bound, so that the PSNR of an exact reconstruction is a number, 106 dB.


class LossWeights(NamedTuple):
  """The weights of the loss's terms, means over pixels in [-1, 1] or over latents; ours."""

  l1: float
  l2: float
  kl: float


def vae_loss(
  model: VAE, frames: Float[Array, "b F H W 3"], key: Key[Array, ""], weights: LossWeights
) -> tuple[Float[Array, ""], Metrics]:
  """Returns the loss of a batch and its terms, on a sample of the posterior that the key draws.

  Each term is a mean over the batch, so that any mesh gives the same numbers.

  Returns:
    The loss; `loss`, `l1`, `kl` and `psnr` in dB.
  """
  mean, logvar = vae.encode(model, frames)
  noise = jax.random.normal(key, mean.shape, mean.dtype)
  restored = vae.decode(model, vae.sample_posterior(mean, logvar, noise))
  l1 = jnp.abs(restored - frames).mean()
  kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
  mse = jnp.square(restored - frames).mean()
  psnr = 10 * jnp.log10(4 / jnp.maximum(mse, SMALLEST_ERROR))  # The range of [-1, 1] is 2.
  loss = weights.l1 * l1 + weights.l2 * mse + weights.kl * kl
  return loss, {"loss": loss, "l1": l1, "kl": kl, "psnr": psnr}


class Network(NamedTuple):
  """A VAE without its parameters, and how a step shards them."""

  graphdef: nnx.GraphDef
  # Gives every device all parameters, because each computes whole clips and splits no channel.
  gather: Callable[[Params], Params]
  pin: Callable[[Params], Params]  # Gives gradients the shardings of their parameters.


def vae_step(
  state: TrainState,
  frames: UInt8[Array, "b F H W 3"],
  key: Key[Array, ""],
  *,
  network: Network,
  updates: Updates,
  weights: LossWeights,
) -> tuple[TrainState, Metrics]:
  """Reconstructs one batch and moves the weights. A pure function, as training.step.train_step.

  Args:
    key: of the run; the number of the step is folded in.

  Returns:
    The next state; the metrics of `vae_loss`, and grad_norm before clipping.
  """
  key = jax.random.fold_in(key, state.step)

  def loss_fn(params: Params) -> tuple[Float[Array, ""], Metrics]:
    return vae_loss(_model(network, params), to_float(frames), key, weights)

  grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
  grads = network.pin(grads)
  metrics["grad_norm"] = optax.tree.norm(grads)
  return updates.apply(state, grads), metrics


def validation_metrics(
  params: Params,
  frames: UInt8[Array, "b F H W 3"],
  key: Key[Array, ""],
  *,
  network: Network,
  weights: LossWeights,
) -> Metrics:
  """Returns the terms of the loss of one batch. The same key draws the same sample."""
  return vae_loss(_model(network, params), to_float(frames), key, weights)[1]


def _model(network: Network, params: Params) -> VAE:
  return nnx.merge(network.graphdef, network.gather(params))


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
