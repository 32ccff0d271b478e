"""The layers of the causal 3D VAE: convolutions that carry frames across chunks, norms, levels."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cogvideox_jax.models.convolution import convolve
from cogvideox_jax.models.vae_config import VAEConfig

EPSILON = 1e-6

Frames = tuple[Float[Array, "b _ _ _ _"], ...]


class Carry:
  """The last frames before a chunk, one entry for each causal convolution.

  `Carry(None)` begins the first chunk of a video, and `Carry(kept)` a later one, where `kept` is
  what the chunk before left. Convolutions take their entries in the order in which they run, which
  is the same in every chunk.
  """

  def __init__(self, frames: Frames | None):
    self._frames = None if frames is None else iter(frames)
    self._kept = []

  def extend(self, x: Float[Array, "b f h w c"], count: int) -> Float[Array, "b f2 h w c"]:
    """Puts the `count` frames before x in front of it; at the first chunk, repeats x's first."""
    before = jnp.repeat(x[:, :1], count, axis=1) if self._frames is None else next(self._frames)
    kept = jnp.concatenate([before, x], axis=1)[:, -count:]
    # The barrier takes the kept frames before x is used: if XLA took them later, all of x would
    # stay in memory until then.
    x, kept = jax.lax.optimization_barrier((x, kept))
    self._kept.append(kept)
    return jnp.concatenate([before, x], axis=1)

  @property
  def kept(self) -> Frames:
    """The last frames of this chunk, for the next one."""
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
  """Group norm over all frames of a chunk; ignores the latents that the decoder's norm takes."""

  def __init__(self, channels: int, config: VAEConfig, *, rngs: nnx.Rngs):
    super().__init__(channels, config.groups, epsilon=EPSILON, use_fast_variance=False, rngs=rngs)

  def __call__(
    self, x: Float[Array, "b f h w c"], z: None = None, *, mask: Array | None = None
  ) -> Float[Array, "b f h w c"]:
    return super().__call__(x, mask=mask)


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
    # The reference resizes z in full and then applies the 1x1x1 convolutions; this order gives the
    # same numbers with less work. The repeats over rows come last, because XLA fuses them into the
    # multiply-add. The repeats along a row come first, on the few channels of z, because TPUs would
    # write scale and shift to memory in full.
    z = _repeat(_resize_frames(z, x.shape[1]), x.shape[3], 3)
    scale, shift = (_repeat(layer(z), x.shape[2], 2) for layer in (self.scale, self.shift))
    return self.norm(x) * scale + shift


def _resize_frames(z: Float[Array, "b f2 h w z"], frames: int) -> Float[Array, "b f h w z"]:
  """Nearest-neighbour resize in time; if `frames` is odd, the first one is not repeated."""
  if frames > 1 and frames % 2:
    return jnp.concatenate([z[:, :1], _repeat(z[:, 1:], frames - 1, 1)], axis=1)
  return _repeat(z, frames, 1)


def _repeat(x: Array, size: int, axis: int) -> Array:
  """Nearest-neighbour resize of one axis."""
  return jnp.repeat(x, size // x.shape[axis], axis)


class ResnetBlock(nnx.Module):
  """Two convolutions, each after a norm, beside a shortcut (diffusers `CogVideoXResnetBlock3D`)."""

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
  """Halves space. If it compresses time, averages pairs of frames, but not an odd first one."""

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
  """Doubles space. If it expands time, repeats every frame, but not an odd first one."""

  def __init__(self, channels: int, expand_time: bool, *, rngs: nnx.Rngs):
    self.expand_time = expand_time
    self.conv = nnx.Conv(channels, channels, (3, 3), padding=1, rngs=rngs)

  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f2 h2 w2 c"]:
    if self.expand_time:
      alone = x.shape[1] % 2
      x = jnp.concatenate([x[:, :alone], jnp.repeat(x[:, alone:], 2, axis=1)], axis=1)
    return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3))


class Level(nnx.Module):
  """The residual blocks of one resolution, then `resample`, if any, to the next resolution."""

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
