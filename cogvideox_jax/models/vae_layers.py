"""The layers of the causal 3D VAE: convolutions that see frames before a chunk, norms, levels.

What depends on where a chunk's other frames are is asked of a `Carry`: which frames came before,
over which frames a norm averages, and whether a first frame stands alone. `Carry` itself is for
chunks that follow one another on one device; `vae_context.RankCarry` is for frames that devices
share.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from cogvideox_jax.models.convolution import convolve
from cogvideox_jax.models.vae_config import VAEConfig

EPSILON = 1e-6

Frames = tuple[Float[Array, "b _ _ _ _"], ...]


class Carry:
  """What the layers know of the frames outside a chunk.

  `Carry(None)` begins the first chunk of a video, and `Carry(kept)` a later one, where `kept` is
  what the chunk before left: the last frames before each causal convolution. Convolutions take
  their entries in the order in which they run, which is the same in every chunk.
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

  def mean(self, x: Float[Array, "b f h w groups c"]) -> Float[Array, "b f2 1 1 groups 1"]:
    """Averages each group over its chunk. f2 is 1, or f if the frames are of several chunks."""
    return x.mean((1, 2, 3, 5), keepdims=True)

  def alone(self, frames: int) -> int:
    """How many first frames of so many, 0 or 1, are not resampled in time."""
    return frames % 2

  def recompute(self, block: "ResnetBlock", x: Array, z: Array | None) -> Array:
    """Returns block(x, z, self), of which the backward pass keeps x alone and computes the rest."""
    graphdef, params = nnx.split(block)
    before = self._take(block.CONVOLUTIONS)

    @jax.checkpoint
    def run(params: Any, x: Array, z: Array | None, before: Any) -> tuple[Array, Any]:
      carry = self._branch(before)
      return nnx.merge(graphdef, params)(x, z, carry), carry.kept

    y, kept = run(params, x, z, before)
    self._kept.extend(kept)
    return y

  def _take(self, count: int) -> Frames | None:
    """Takes the entries of the next `count` convolutions."""
    return None if self._frames is None else tuple(itertools.islice(self._frames, count))

  def _branch(self, frames: Frames | None) -> "Carry":
    """Returns a carry for the convolutions that have these entries."""
    return Carry(frames)

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


class GroupNorm(nnx.GroupNorm):
  """Group norm over the frames of a chunk; mean, then mean square of what is centred."""

  def __init__(self, channels: int, config: VAEConfig, *, rngs: nnx.Rngs):
    super().__init__(channels, config.groups, epsilon=EPSILON, rngs=rngs)

  def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
    self, x: Float[Array, "b f h w c"], carry: Carry
  ) -> Float[Array, "b f h w c"]:
    assert self.scale is not None and self.bias is not None
    x, scale, bias = self.promote_dtype((x, self.scale[...], self.bias[...]), dtype=None)
    groups = rearrange(x, "b f h w (groups c) -> b f h w groups c", groups=self.num_groups)
    groups = groups.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = carry.mean(groups)
    variance = carry.mean(jnp.square(groups - mean))
    mean, variance = (
      jnp.repeat(statistic[..., 0], self.group_size, axis=-1) for statistic in (mean, variance)
    )
    y = (x - mean) * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias
    return y.astype(x.dtype)


class EncoderNorm(GroupNorm):
  """Group norm that ignores the latents that the decoder's norm takes."""

  def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
    self, x: Float[Array, "b f h w c"], z: None, carry: Carry
  ) -> Float[Array, "b f h w c"]:
    return super().__call__(x, carry)


class DecoderNorm(nnx.Module):
  """Group norm scaled and shifted by the chunk's latents (diffusers `CogVideoXSpatialNorm3D`)."""

  def __init__(self, channels: int, config: VAEConfig, *, rngs: nnx.Rngs):
    self.norm = GroupNorm(channels, config, rngs=rngs)
    ones = nnx.initializers.ones
    self.scale = nnx.Linear(config.latent_channels, channels, bias_init=ones, rngs=rngs)
    self.shift = nnx.Linear(config.latent_channels, channels, rngs=rngs)

  def __call__(
    self, x: Float[Array, "b f h w c"], z: Float[Array, "b f2 h2 w2 z"], carry: Carry
  ) -> Float[Array, "b f h w c"]:
    # The reference resizes z in full and then applies the 1x1x1 convolutions; this order gives the
    # same numbers with less work. The repeats over rows come last, because XLA fuses them into the
    # multiply-add. The repeats along a row come first, on the few channels of z, because TPUs would
    # write scale and shift to memory in full.
    z = _repeat(_resize_frames(z, x.shape[1], carry), x.shape[3], 3)
    scale, shift = (_repeat(layer(z), x.shape[2], 2) for layer in (self.scale, self.shift))
    return self.norm(x, carry) * scale + shift


def _resize_frames(
  z: Float[Array, "b f2 h w z"], frames: int, carry: Carry
) -> Float[Array, "b f h w z"]:
  """Nearest-neighbour resize in time; a first frame that stands alone is not repeated."""
  if frames > 1 and carry.alone(frames):
    return jnp.concatenate([z[:, :1], _repeat(z[:, 1:], frames - 1, 1)], axis=1)
  return _repeat(z, frames, 1)


def _repeat(x: Array, size: int, axis: int) -> Array:
  """Nearest-neighbour resize of one axis."""
  return jnp.repeat(x, size // x.shape[axis], axis)


class ResnetBlock(nnx.Module):
  """Two convolutions, each after a norm, beside a shortcut (diffusers `CogVideoXResnetBlock3D`)."""

  CONVOLUTIONS = 2  # That take an entry of a carry.

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
    h = self.conv1(nnx.silu(self.norm1(x, z, carry)), carry)
    h = self.conv2(nnx.silu(self.norm2(h, z, carry)), carry)
    return h + (x if self.shortcut is None else self.shortcut(x))


class Downsample(nnx.Module):
  """Halves space. If it compresses time, averages pairs of frames but not one that is alone."""

  def __init__(self, channels: int, compress_time: bool, *, rngs: nnx.Rngs):
    self.compress_time = compress_time
    # The reference pads on the right and bottom only.
    padding = ((0, 1), (0, 1))
    self.conv = nnx.Conv(channels, channels, (3, 3), strides=2, padding=padding, rngs=rngs)

  def __call__(self, x: Float[Array, "b f h w c"], carry: Carry) -> Float[Array, "b f2 h2 w2 c"]:
    if self.compress_time:
      alone = carry.alone(x.shape[1])
      pairs = (x[:, alone::2] + x[:, alone + 1 :: 2]) / 2
      x = jnp.concatenate([x[:, :alone], pairs], axis=1)
    return self.conv(x)


class Upsample(nnx.Module):
  """Doubles space. If it expands time, repeats every frame but not one that is alone."""

  def __init__(self, channels: int, expand_time: bool, *, rngs: nnx.Rngs):
    self.expand_time = expand_time
    self.conv = nnx.Conv(channels, channels, (3, 3), padding=1, rngs=rngs)

  def __call__(self, x: Float[Array, "b f h w c"], carry: Carry) -> Float[Array, "b f2 h2 w2 c"]:
    if self.expand_time:
      alone = carry.alone(x.shape[1])
      x = jnp.concatenate([x[:, :alone], jnp.repeat(x[:, alone:], 2, axis=1)], axis=1)
    return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3))


class Level(nnx.Module):
  """The residual blocks of one resolution, then `resample`, if any, to the next resolution.

  remat: whether the backward pass computes again what is inside a block and inside `resample`.
  """

  def __init__(
    self, channels: int, out_channels: int, count: int, norm, resample, config, *, remat, rngs
  ):
    widths = [channels] + [out_channels] * count
    self.resnets = nnx.List(
      [ResnetBlock(*pair, norm, config, rngs=rngs) for pair in itertools.pairwise(widths)]
    )
    self.resample = resample
    self.remat = remat

  def __call__(
    self, x: Float[Array, "b f h w c"], z: Float[Array, "b f2 h2 w2 z"] | None, carry: Carry
  ) -> Float[Array, "b f3 h3 w3 o"]:
    for resnet in self.resnets:
      x = carry.recompute(resnet, x, z) if self.remat else resnet(x, z, carry)
    if self.resample is None:
      return x
    if not self.remat:
      return self.resample(x, carry)
    graphdef, params = nnx.split(self.resample)
    return jax.checkpoint(lambda params, x: nnx.merge(graphdef, params)(x, carry))(params, x)
