"""Runs the VAE on a mesh whose devices share the frames of a clip in time.

Two frames go from each device to the next before a convolution, and norms sum their moments over
the devices. So numbers and gradients are those of one device with the same plan of chunks, and no
activation is gathered. A training step calls it in place of `vae.encode` and `vae.decode`, under
`jax.jit`:

  shared = share_clips(mesh, rules, config.model.temporal_compression, frames.shape[1], plan="sat")

  def loss(params, frames, noise):  # [b, F, H, W, 3] and [b, f, h, w, c], rows split over the mesh.
    model = nnx.merge(graphdef, params)  # All devices hold all parameters.
    frames = shared.spread(frames)
    mean, logvar = shared.encode(model, frames)
    z = vae.sample_posterior(mean, logvar, shared.spread_latents(noise))
    restored = shared.decode(model, z)
    kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar)
    return shared.mean(jnp.abs(restored - frames)) + shared.mean_of_latents(kl)

On a mesh that does not split frames, `spread` returns what it is given, and the others are
`vae.encode`, `vae.decode` and plain means.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from cogvideox_jax.models import vae
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.models.vae_context import RankCarry, Split, split_decoding, split_encoding
from cogvideox_jax.sharding import Rules, shard_count


class SharedClips(NamedTuple):
  """How the devices of a mesh share clips of one length; made by `share_clips`.

  Arrays of shared clips have an axis of slots, `S` of pixels and `s` of latents, in place of
  frames: see models/vae_context.py. They are split over the devices.
  """

  mesh: Mesh
  rules: Rules
  plan: str
  encoding: Split
  decoding: Split

  def spread(self, frames: Float[Array, "b F H W c"]) -> Float[Array, "b S H W c"]:
    """Gives each device its frames, of which the other devices of a row hold copies before."""
    if self._alone:
      return frames
    return self._split(jnp.take(frames, self.encoding.frame_of_slot(), axis=1))

  def spread_latents(self, z: Float[Array, "b f h w c"]) -> Float[Array, "b s h w c"]:
    """Gives each device its latent frames; slots beyond the last one are 0."""
    if self._alone:
      return z
    filled = self.decoding.ranks * self.decoding.blocks - self.decoding.latents
    return self._split(jnp.pad(z, ((0, 0), (0, filled), (0, 0), (0, 0), (0, 0))))

  def encode(
    self, model: VAE, frames: Float[Array, "b S H W 3"]
  ) -> tuple[Float[Array, "b s h w c"], Float[Array, "b s h w c"]]:
    """Returns the means and log-variances of spread frames, as `vae.encode`."""
    if self._alone:
      return vae.encode(model, frames, plan=self.plan)
    graphdef, params = nnx.split(model)

    def on_rank(params: Any, x: Array) -> Array:
      return nnx.merge(graphdef, params).encoder(x, RankCarry(self.encoding))

    return vae.mean_and_logvar(self.map(on_rank, params, frames))

  def decode(self, model: VAE, z: Float[Array, "b s h w c"]) -> Float[Array, "b S H W 3"]:
    """Returns the frames of spread latents, as `vae.decode`."""
    if self._alone:
      return vae.decode(model, z, plan=self.plan)
    graphdef, params = nnx.split(model)

    def on_rank(params: Any, z: Array) -> Array:
      return nnx.merge(graphdef, params).decoder(z, RankCarry(self.decoding))

    return self.map(on_rank, params, z)

  def map(self, run: Callable[..., Array], params: Any, *arrays: Array) -> Array:
    """Returns run(params, *arrays) of each device, for what looks at single frames.

    Args:
      run: takes arrays [rows, slots, ...] of one device, and returns one.
      params: a tree of arrays that all devices hold.
      arrays: spread arrays.
    """
    if self._alone:
      return run(params, *arrays)
    axes, spec = (*self.rules["rows"], *self.rules["frames"]), self._spec

    def on_rank(params: Any, *arrays: Array) -> Array:
      # So each device has a gradient of its own, which is summed once and not in every layer.
      params = jax.tree.map(partial(jax.lax.pcast, axis_name=axes, to="varying"), params)
      return run(params, *arrays)

    sharded = jax.shard_map(
      on_rank,
      mesh=self.mesh,
      in_specs=(PartitionSpec(), *(spec for _ in arrays)),
      out_specs=spec,
      axis_names=set(axes),
    )
    return sharded(params, *arrays)

  def mean(self, x: Float[Array, "b S ..."]) -> Float[Array, ""]:
    """Returns the mean over a spread array of pixels, each frame counted once."""
    return x.mean() if self._alone else _mean(x, self.encoding.counted(self.encoding.compression))

  def mean_of_latents(self, x: Float[Array, "b s ..."]) -> Float[Array, ""]:
    """Returns the mean over a spread array of latents."""
    return x.mean() if self._alone else _mean(x, self.encoding.counted(1))

  def whole(self, frames: Float[Array, "b S H W c"]) -> Float[Array, "b F H W c"]:
    """Returns spread frames in order. All devices of a row get them, which moves whole clips."""
    if self._alone:
      return frames
    copies = self.encoding.compression - 1
    return frames[:, copies : copies + self.encoding.frames]

  def whole_latents(self, z: Float[Array, "b s h w c"]) -> Float[Array, "b f h w c"]:
    """Returns spread latents without the slots that are beyond the last one."""
    return z if self._alone else z[:, : self.encoding.latents]

  @property
  def _alone(self) -> bool:
    return self.encoding.ranks == 1

  @property
  def _spec(self) -> PartitionSpec:
    return PartitionSpec(self.rules["rows"], self.rules["frames"])

  def _split(self, x: Array) -> Array:
    lines = self.rules["lines"]
    spec = PartitionSpec(*self._spec, None if x.shape[2] % shard_count(self.mesh, lines) else lines)
    return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def share_clips(
  mesh: Mesh, rules: Rules, compression: int, frames: int, *, plan: str = "diffusers"
) -> SharedClips:
  """Says how the devices of a mesh share clips of so many frames.

  Args:
    compression: the VAE's in time.
    plan: how clips are cut into chunks, a key of `vae.PLANS`; part of the numbers.

  Raises:
    UserError: several devices share a clip, and the plan's chunks of so many frames do not allow
      it.
  """
  ranks = shard_count(mesh, rules["frames"])
  encoding = split_encoding(frames, compression, plan, rules["frames"], ranks)
  decoding = split_decoding(encoding.latents, compression, plan, rules["frames"], ranks)
  return SharedClips(mesh, rules, plan, encoding, decoding)


def _mean(x: Array, counted: np.ndarray) -> Float[Array, ""]:
  weight = counted.reshape(-1)
  of_slots = x.mean(tuple(axis for axis in range(x.ndim) if axis != 1))
  return (of_slots * weight).sum() / weight.sum()
