"""The causal 3D VAE (paper 2.1; diffusers `AutoencoderKLCogVideoX`).

It compresses videos 8x8 in space and 4x in time, but the first frame in space only. A video goes
through in chunks. The causal convolutions carry their last frames from each chunk to the next, so
that later chunks never change earlier latents. Within a chunk only the convolutions are causal:
group norm averages over all frames of its chunk, so that the result depends on how the video is cut
into chunks.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cogvideox_jax.errors import UserError
from cogvideox_jax.models.precision import exact_in_float32
from cogvideox_jax.models.tiling import Tiling
from cogvideox_jax.models.vae_config import VAEConfig
from cogvideox_jax.models.vae_layers import (
  Carry,
  CausalConv,
  DecoderNorm,
  Downsample,
  EncoderNorm,
  Level,
  Upsample,
)

ENCODE_CHUNK = 8  # Pixel frames, diffusers `num_sample_frames_batch_size`.
DECODE_CHUNK = 2  # Latent frames, diffusers `num_latent_frames_batch_size`.
MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0


class Encoder(nnx.Module):
  """Turns a chunk of frames into the means and log-variances of its latents."""

  def __init__(self, config: VAEConfig, *, remat: bool = False, rngs: nnx.Rngs):
    channels = config.channels
    self.conv_in = CausalConv(config.in_channels, channels[0], rngs=rngs)
    self.down = nnx.List([])
    for i, (width, out) in enumerate(zip((channels[0], *channels), channels, strict=False)):
      last = i == len(channels) - 1
      down = None if last else Downsample(out, i < config.temporal_levels, rngs=rngs)
      self.down.append(
        Level(width, out, config.resnets, EncoderNorm, down, config, remat=remat, rngs=rngs)
      )
    self.mid = Level(
      channels[-1], channels[-1], 2, EncoderNorm, None, config, remat=remat, rngs=rngs
    )
    self.norm_out = EncoderNorm(channels[-1], config, rngs=rngs)
    self.conv_out = CausalConv(channels[-1], 2 * config.latent_channels, rngs=rngs)

  @exact_in_float32
  def __call__(self, x: Float[Array, "b F H W c"], carry: Carry) -> Float[Array, "b f h w z2"]:
    x = self.conv_in(x, carry)
    for level in (*self.down, self.mid):
      x = level(x, None, carry)
    return self.conv_out(nnx.silu(self.norm_out(x, None, carry)), carry)


class Decoder(nnx.Module):
  """Turns a chunk of latents into frames."""

  def __init__(self, config: VAEConfig, *, remat: bool = False, rngs: nnx.Rngs):
    channels = config.channels[::-1]
    count = config.resnets + 1
    self.conv_in = CausalConv(config.latent_channels, channels[0], rngs=rngs)
    self.mid = Level(channels[0], channels[0], 2, DecoderNorm, None, config, remat=remat, rngs=rngs)
    self.up = nnx.List([])
    for i, (width, out) in enumerate(zip((channels[0], *channels), channels, strict=False)):
      last = i == len(channels) - 1
      up = None if last else Upsample(out, i < config.temporal_levels, rngs=rngs)
      self.up.append(Level(width, out, count, DecoderNorm, up, config, remat=remat, rngs=rngs))
    self.norm_out = DecoderNorm(channels[-1], config, rngs=rngs)
    self.conv_out = CausalConv(channels[-1], config.in_channels, rngs=rngs)

  @exact_in_float32
  def __call__(self, z: Float[Array, "b f h w z"], carry: Carry) -> Float[Array, "b F H W c"]:
    x = self.conv_in(z, carry)
    for level in (self.mid, *self.up):
      x = level(x, z, carry)
    return self.conv_out(nnx.silu(self.norm_out(x, z, carry)), carry)


class VAE(nnx.Module):
  """The encoder and the decoder. Call `encode` and `decode` below, which cut videos into chunks.

  remat: whether a backward pass computes again what is inside each ResNet block. It saves most of
    the memory of a training step.
  """

  def __init__(self, config: VAEConfig, *, remat: bool = False, rngs: nnx.Rngs):
    self.encoder = Encoder(config, remat=remat, rngs=rngs)
    self.decoder = Decoder(config, remat=remat, rngs=rngs)


class Plan(NamedTuple):
  """Where a video is cut into chunks: part of the numbers, because group norm sees one chunk."""

  encode: Callable[[int], list[int]]  # Number of pixel frames -> where each chunk ends.
  decode: Callable[[int], list[int]]  # Number of latent frames -> where each chunk ends.


def chunks_of(size: int, count: int) -> list[int]:
  """Cuts `count` frames into chunks of `size`; the remainder joins the first chunk."""
  return _ends(count, max(1, count // size), size)


def at_most(chunks: int, count: int) -> list[int]:
  """Cuts `count` frames into `chunks`, or fewer of two frames; the remainder joins the first."""
  chunks = max(1, min(chunks, count // 2))
  return _ends(count, chunks, count // chunks)


def _ends(count: int, chunks: int, size: int) -> list[int]:
  return [count - size * later for later in reversed(range(chunks))]


PLANS = {
  "diffusers": Plan(partial(chunks_of, ENCODE_CHUNK), partial(chunks_of, DECODE_CHUNK)),
  "sat": Plan(partial(at_most, 1), partial(at_most, 10)),
}


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def encode_chunk(graphdef, params, x, frames):
  """Returns the moments of a chunk's latents, and the frames that it leaves for the next chunk.

  frames: what the chunk before left; None at the first one. Their memory is given away.
  """
  carry = Carry(frames)
  return nnx.merge(graphdef, params).encoder(x, carry), carry.kept


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode_chunk(graphdef, params, z, frames):
  """Returns a chunk's frames, and those that it leaves for the next chunk; see `encode_chunk`."""
  carry = Carry(frames)
  return nnx.merge(graphdef, params).decoder(z, carry), carry.kept


def _each_chunk(run, vae: VAE, chunks: Iterable[Array]) -> Iterator[Array]:
  """Loops over the chunks on the host; all but the first have one shape and share a program."""
  graphdef, params = nnx.split(vae)
  kept = None
  for chunk in chunks:
    result, kept = run(graphdef, params, chunk, kept)
    yield result


def _by_chunks(run, vae: VAE, ends: list[int], x: Array) -> Array:
  chunks = (x[:, start:end] for start, end in itertools.pairwise([0, *ends]))
  return jnp.concatenate(list(_each_chunk(run, vae, chunks)), axis=1)


def encode_stream(
  vae: VAE, chunks: Iterable[Float[Array, "b _ H W 3"]]
) -> Iterator[tuple[Float[Array, "b _ h w c"], Float[Array, "b _ h w c"]]]:
  """Yields the means and log-variances of each chunk, as `encode` of all of them.

  It takes a chunk when the last one's latents have been taken, so that memory does not grow with
  the length of a video.

  Args:
    chunks: the frames between the ends that a plan of PLANS gives for their number, in order.
  """
  return map(mean_and_logvar, _each_chunk(encode_chunk, vae, chunks))


def decode_stream(
  vae: VAE, chunks: Iterable[Float[Array, "b _ h w c"]]
) -> Iterator[Float[Array, "b _ H W 3"]]:
  """Yields the frames of each chunk of latents; see `encode_stream`."""
  return _each_chunk(decode_chunk, vae, chunks)


def encode(
  vae: VAE,
  frames: Float[Array, "b F H W 3"],
  *,
  tiling: Tiling | None = None,
  plan: str = "diffusers",
) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f h w c"]]:
  """Returns the means and log-variances of the latents, which are not scaled.

  Args:
    frames: in [-1, 1].
    tiling: cuts frames larger than a tile into tiles, so that memory is that of one tile.
    plan: how to cut the video into chunks, a key of PLANS.
  """
  run = partial(_by_chunks, encode_chunk, vae, PLANS[plan].encode(frames.shape[1]))
  moments = run(frames) if tiling is None else tiling.encode(run, frames)
  return mean_and_logvar(moments)


def mean_and_logvar(
  moments: Float[Array, "b f h w z2"],
) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f h w c"]]:
  """Splits what the encoder gives into the means and the log-variances, which it bounds."""
  mean, logvar = jnp.split(moments, 2, axis=-1)
  return mean, jnp.clip(logvar, MIN_LOGVAR, MAX_LOGVAR)


def sample_posterior(
  mean: Float[Array, "b f h w c"],
  logvar: Float[Array, "b f h w c"],
  noise: Float[Array, "b f h w c"],
) -> Float[Array, "b f h w c"]:
  """A sample of the latents; noise: standard normal."""
  return mean + jnp.exp(logvar / 2) * noise


def decode(
  vae: VAE,
  z: Float[Array, "b f h w c"],
  *,
  tiling: Tiling | None = None,
  plan: str = "diffusers",
) -> Float[Array, "b F H W 3"]:
  """Returns frames, in about [-1, 1].

  An odd number of latent frames f gives `4 f - 3` frames, an even one `4 f`, as in the reference.

  Args:
    z: latents, divided by the scaling factor.
    tiling, plan: as for `encode`.

  Raises:
    UserError: the plan is SAT's and the number of latent frames is even; SAT would then decode the
      first frame alone.
  """
  if plan == "sat" and z.shape[1] % 2 == 0:
    raise UserError(f"SAT's plan of chunks decodes odd numbers of latent frames, not {z.shape[1]}.")
  run = partial(_by_chunks, decode_chunk, vae, PLANS[plan].decode(z.shape[1]))
  return run(z) if tiling is None else tiling.decode(run, z)
