"""The causal 3D VAE (paper 2.1; diffusers `AutoencoderKLCogVideoX`).

Videos are compressed 8x8 in space and 4x in time, the first frame alone. A video goes through in
chunks; the causal convolutions carry their last frames from each chunk to the next, so later
chunks never change earlier latents. Inside a chunk only the convolutions are causal: group norm
sees all frames of its chunk, so the plan of chunks is part of the numbers.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cogvideox_jax.config_keys import key
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.convolution import convolve
from cogvideox_jax.models.tiling import Tiling

ENCODE_CHUNK = 8  # Pixel frames, diffusers `num_sample_frames_batch_size`.
DECODE_CHUNK = 2  # Latent frames, diffusers `num_latent_frames_batch_size`.
EPSILON = 1e-6
MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0
# What image latents are multiplied with, s being the scaling factor: `scaled` is s, `raw` 1,
# `diffusers` s, but 1/s for 1.5, whose code paths disagree: SAT trains it with s and samples it
# with 1, diffusers samples it with 1/s ("the team forgot to multiply in training"); users report
# that 1 looks best. All that is published of 1.0 has s.
IMAGE_SCALES = ("scaled", "raw", "diffusers")

Frames = tuple[Float[Array, "b _ _ _ _"], ...]


@dataclass(frozen=True)
class VAEConfig:
  """Sizes of the VAE; the defaults are those of every published model."""

  in_channels: int = field(default=3, metadata=key("Channels of pixels."))
  channels: tuple[int, ...] = field(
    default=(128, 256, 256, 512),
    metadata=key("Channels of each level, finest first.", form="hold numbers, such as (16, 32)"),
  )
  latent_channels: int = field(default=16, metadata=key("Channels of latents."))
  resnets: int = field(
    default=3, metadata=key("ResNet blocks in each level of the encoder; the decoder has one more.")
  )
  groups: int = field(
    default=32, metadata=key("Groups of the group norms; divides every number of channels.")
  )
  temporal_compression: int = field(
    default=4,
    metadata=key("Frames to a latent frame, a power of 2; the finest levels compress time."),
  )
  scaling_factor: float = 0.7  # Latents times this have about unit variance; 1.15258426 for 2B.
  invert_scale_latents: bool = False  # 1.5: image latents are divided by it, as diffusers reads it.
  sample_height: int = 480  # Pixels; tiles are half of it, and of the width.
  sample_width: int = 720

  def image_scale(self, choice: str) -> float:
    """What a choice of IMAGE_SCALES multiplies the latents of an image with."""
    if choice == "raw":
      return 1.0
    inverts = choice == "diffusers" and self.invert_scale_latents
    return 1 / self.scaling_factor if inverts else self.scaling_factor

  @property
  def spatial_compression(self) -> int:
    return 2 ** (len(self.channels) - 1)

  @property
  def tiling(self) -> Tiling:
    """Tiles of half the sample size, as diffusers' `enable_tiling` cuts them."""
    return Tiling.of(self.sample_height // 2, self.sample_width // 2, self.spatial_compression)

  @property
  def temporal_levels(self) -> int:
    return int(math.log2(self.temporal_compression))


class Carry:
  """What the causal convolutions remember of the frames before a chunk.

  Built from the frames that the chunk before left in `kept`, or from None at the first chunk. The
  convolutions ask in the order in which they run, which is the same in every chunk.
  """

  def __init__(self, frames: Frames | None):
    self._frames = None if frames is None else iter(frames)
    self._kept = []

  def extend(self, x: Float[Array, "b f h w c"], count: int) -> Float[Array, "b f2 h w c"]:
    """Puts the `count` frames before x in front of it: at the first chunk, its first, repeated."""
    before = jnp.repeat(x[:, :1], count, axis=1) if self._frames is None else next(self._frames)
    kept = jnp.concatenate([before, x], axis=1)[:, -count:]
    # Taken before anything is made of x: a compiler that puts it off keeps all of x meanwhile.
    x, kept = jax.lax.optimization_barrier((x, kept))
    self._kept.append(kept)
    return jnp.concatenate([before, x], axis=1)

  @property
  def kept(self) -> Frames:
    return tuple(self._kept)


class CausalConv(nnx.Module):
  """3x3x3 convolution that sees no later frame (diffusers `CogVideoXCausalConv3d`)."""

  def __init__(self, channels: int, out_channels: int, *, rngs: nnx.Rngs):
    shape = (3, 3, 3, channels, out_channels)
    self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))
    self.bias = nnx.Param(jnp.zeros(out_channels))

  def __call__(self, x: Float[Array, "b f h w c"], carry: Carry) -> Float[Array, "b f h w o"]:
    x = carry.extend(x, self.kernel.shape[0] - 1)
    return convolve(x, self.kernel[...]) + self.bias[...]


def group_norm(channels: int, groups: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
  return nnx.GroupNorm(channels, groups, epsilon=EPSILON, use_fast_variance=False, rngs=rngs)


class EncoderNorm(nnx.GroupNorm):
  """Group norm over all frames of a chunk; takes and ignores what the decoder's norm needs."""

  def __init__(self, channels: int, config: VAEConfig, *, rngs: nnx.Rngs):
    super().__init__(channels, config.groups, epsilon=EPSILON, use_fast_variance=False, rngs=rngs)

  def __call__(self, x: Float[Array, "b f h w c"], z: None = None) -> Float[Array, "b f h w c"]:
    return super().__call__(x)


class DecoderNorm(nnx.Module):
  """Group norm scaled and shifted by the chunk's latents (diffusers `CogVideoXSpatialNorm3D`)."""

  def __init__(self, channels: int, config: VAEConfig, *, rngs: nnx.Rngs):
    self.norm = group_norm(channels, config.groups, rngs)
    ones = nnx.initializers.ones
    self.scale = nnx.Linear(config.latent_channels, channels, bias_init=ones, rngs=rngs)
    self.shift = nnx.Linear(config.latent_channels, channels, rngs=rngs)

  def __call__(
    self, x: Float[Array, "b f h w c"], z: Float[Array, "b f2 h2 w2 z"]
  ) -> Float[Array, "b f h w c"]:
    # The reference resizes z first; a 1x1x1 convolution of repeated values is the same, dearer. So
    # it comes before rows are repeated, which XLA does as it multiplies and adds. Along a row TPUs
    # would write all of scale and shift to memory: there the few channels of z are repeated.
    z = _repeat(_resize_frames(z, x.shape[1]), x.shape[3], 3)
    scale, shift = (_repeat(layer(z), x.shape[2], 2) for layer in (self.scale, self.shift))
    return self.norm(x) * scale + shift


def _resize_frames(z: Float[Array, "b f2 h w z"], frames: int) -> Float[Array, "b f h w z"]:
  """Nearest-neighbour resize in time; the first of an odd number of frames stays alone."""
  if frames > 1 and frames % 2:
    return jnp.concatenate([z[:, :1], _repeat(z[:, 1:], frames - 1, 1)], axis=1)
  return _repeat(z, frames, 1)


def _repeat(x: Array, size: int, axis: int) -> Array:
  """Nearest-neighbour resize of one axis."""
  return jnp.repeat(x, size // x.shape[axis], axis)


class ResnetBlock(nnx.Module):
  def __init__(self, channels: int, out_channels: int, norm, config: VAEConfig, *, rngs: nnx.Rngs):
    self.norm1 = norm(channels, config, rngs=rngs)
    self.conv1 = CausalConv(channels, out_channels, rngs=rngs)
    self.norm2 = norm(out_channels, config, rngs=rngs)
    self.conv2 = CausalConv(out_channels, out_channels, rngs=rngs)
    same = channels == out_channels
    self.shortcut = None if same else nnx.Linear(channels, out_channels, rngs=rngs)

  def __call__(
    self, x: Float[Array, "b f h w c"], z: Float[Array, "b f2 h2 w2 z"] | None, carry: Carry
  ) -> Float[Array, "b f h w o"]:
    h = self.conv1(nnx.silu(self.norm1(x, z)), carry)
    h = self.conv2(nnx.silu(self.norm2(h, z)), carry)
    return h + (x if self.shortcut is None else self.shortcut(x))


class Downsample(nnx.Module):
  """Halves space and, where it compresses time, averages pairs of frames but an odd first one."""

  def __init__(self, channels: int, compress_time: bool, *, rngs: nnx.Rngs):
    self.compress_time = compress_time
    # The reference pads on the right and bottom only.
    padding = ((0, 1), (0, 1))
    self.conv = nnx.Conv(channels, channels, (3, 3), strides=2, padding=padding, rngs=rngs)

  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f2 h2 w2 c"]:
    if self.compress_time:
      alone = x.shape[1] % 2
      pairs = (x[:, alone::2] + x[:, alone + 1 :: 2]) / 2
      x = jnp.concatenate([x[:, :alone], pairs], axis=1)
    return self.conv(x)


class Upsample(nnx.Module):
  """Doubles space and, where it expands time, every frame but an odd first one."""

  def __init__(self, channels: int, expand_time: bool, *, rngs: nnx.Rngs):
    self.expand_time = expand_time
    self.conv = nnx.Conv(channels, channels, (3, 3), padding=1, rngs=rngs)

  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f2 h2 w2 c"]:
    if self.expand_time:
      alone = x.shape[1] % 2
      x = jnp.concatenate([x[:, :alone], jnp.repeat(x[:, alone:], 2, axis=1)], axis=1)
    return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3))


class Level(nnx.Module):
  """The residual blocks of one resolution, then the change to the next, if there is one."""

  def __init__(self, channels: int, out_channels: int, count: int, norm, resample, config, *, rngs):
    widths = [channels] + [out_channels] * count
    self.resnets = nnx.List(
      [ResnetBlock(*pair, norm, config, rngs=rngs) for pair in itertools.pairwise(widths)]
    )
    self.resample = resample

  def __call__(
    self, x: Float[Array, "b f h w c"], z: Float[Array, "b f2 h2 w2 z"] | None, carry: Carry
  ) -> Float[Array, "b f3 h3 w3 o"]:
    for resnet in self.resnets:
      x = resnet(x, z, carry)
    return x if self.resample is None else self.resample(x)


class Encoder(nnx.Module):
  """Frames of a chunk to the moments of their latents."""

  def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
    channels = config.channels
    self.conv_in = CausalConv(config.in_channels, channels[0], rngs=rngs)
    self.down = nnx.List([])
    for i, (width, out) in enumerate(zip((channels[0], *channels), channels, strict=False)):
      last = i == len(channels) - 1
      down = None if last else Downsample(out, i < config.temporal_levels, rngs=rngs)
      self.down.append(Level(width, out, config.resnets, EncoderNorm, down, config, rngs=rngs))
    self.mid = Level(channels[-1], channels[-1], 2, EncoderNorm, None, config, rngs=rngs)
    self.norm_out = EncoderNorm(channels[-1], config, rngs=rngs)
    self.conv_out = CausalConv(channels[-1], 2 * config.latent_channels, rngs=rngs)

  def __call__(self, x: Float[Array, "b F H W c"], carry: Carry) -> Float[Array, "b f h w z2"]:
    x = self.conv_in(x, carry)
    for level in (*self.down, self.mid):
      x = level(x, None, carry)
    return self.conv_out(nnx.silu(self.norm_out(x)), carry)


class Decoder(nnx.Module):
  """Latents of a chunk to frames."""

  def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
    channels = config.channels[::-1]
    count = config.resnets + 1
    self.conv_in = CausalConv(config.latent_channels, channels[0], rngs=rngs)
    self.mid = Level(channels[0], channels[0], 2, DecoderNorm, None, config, rngs=rngs)
    self.up = nnx.List([])
    for i, (width, out) in enumerate(zip((channels[0], *channels), channels, strict=False)):
      last = i == len(channels) - 1
      up = None if last else Upsample(out, i < config.temporal_levels, rngs=rngs)
      self.up.append(Level(width, out, count, DecoderNorm, up, config, rngs=rngs))
    self.norm_out = DecoderNorm(channels[-1], config, rngs=rngs)
    self.conv_out = CausalConv(channels[-1], config.in_channels, rngs=rngs)

  def __call__(self, z: Float[Array, "b f h w z"], carry: Carry) -> Float[Array, "b F H W c"]:
    x = self.conv_in(z, carry)
    for level in (self.mid, *self.up):
      x = level(x, z, carry)
    return self.conv_out(nnx.silu(self.norm_out(x, z)), carry)


class VAE(nnx.Module):
  """Encoder and decoder. Use `encode` and `decode`, which follow the plan of chunks."""

  def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
    self.encoder = Encoder(config, rngs=rngs)
    self.decoder = Decoder(config, rngs=rngs)


class Plan(NamedTuple):
  """How a video is cut into chunks, which is part of the numbers: group norm sees one at a time."""

  encode: Callable[[int], list[int]]  # Frames of the video -> where each chunk ends.
  decode: Callable[[int], list[int]]  # Latents of the video -> where each chunk ends.


def chunks_of(size: int, count: int) -> list[int]:
  """Chunks of `size` frames; the remainder joins the first one."""
  return _ends(count, max(1, count // size), size)


def at_most(chunks: int, count: int) -> list[int]:
  """So many chunks, of two frames at least; the remainder joins the first one."""
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
  carry = Carry(frames)
  return nnx.merge(graphdef, params).encoder(x, carry), carry.kept


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode_chunk(graphdef, params, z, frames):
  carry = Carry(frames)
  return nnx.merge(graphdef, params).decoder(z, carry), carry.kept


def _by_chunks(run, vae: VAE, ends: list[int], x: Array) -> Array:
  """Loops over the chunks on the host: one program for the first one's shape, one for the rest."""
  graphdef, params = nnx.split(vae)
  results, kept, start = [], None, 0
  for end in ends:
    result, kept = run(graphdef, params, x[:, start:end], kept)
    results.append(result)
    start = end
  return jnp.concatenate(results, axis=1)


def encode(
  vae: VAE,
  frames: Float[Array, "b F H W 3"],
  *,
  tiling: Tiling | None = None,
  plan: str = "diffusers",
) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f h w c"]]:
  """Frames in [-1, 1] to the mean and log-variance of their latents, which are not scaled.

  Args:
    tiling: for frames larger than a tile, so that memory is that of one tile.
    plan: of chunks, one of PLANS.
  """
  run = partial(_by_chunks, encode_chunk, vae, PLANS[plan].encode(frames.shape[1]))
  moments = run(frames) if tiling is None else tiling.encode(run, frames)
  mean, logvar = jnp.split(moments, 2, axis=-1)
  return mean, jnp.clip(logvar, MIN_LOGVAR, MAX_LOGVAR)


def sample_posterior(
  mean: Float[Array, "b f h w c"],
  logvar: Float[Array, "b f h w c"],
  noise: Float[Array, "b f h w c"],  # Standard normal.
) -> Float[Array, "b f h w c"]:
  return mean + jnp.exp(logvar / 2) * noise


def decode(
  vae: VAE,
  z: Float[Array, "b f h w c"],
  *,
  tiling: Tiling | None = None,
  plan: str = "diffusers",
) -> Float[Array, "b F H W 3"]:
  """Latents, divided by the scaling factor, to frames of about [-1, 1].

  An odd number of latents gives `4 f - 3` frames, an even one `4 f`, as in the reference.

  Args:
    tiling, plan: as of `encode`.

  Raises:
    UserError: SAT's plan and an even number of latents, whose first frame it would take alone.
  """
  if plan == "sat" and z.shape[1] % 2 == 0:
    raise UserError(f"SAT's plan of chunks decodes odd numbers of latent frames, not {z.shape[1]}.")
  run = partial(_by_chunks, decode_chunk, vae, PLANS[plan].decode(z.shape[1]))
  return run(z) if tiling is None else tiling.decode(run, z)
