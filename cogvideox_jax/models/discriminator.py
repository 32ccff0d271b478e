"""The discriminator of the VAE's training: tells clips from reconstructions, patch by patch.

The paper (2.1) says only that it is 3D. As in the authors' code, which never ran, blocks that see
space and time come first, and blocks that see single frames follow. Here the frames that are left
keep logits of their own, where that code averages them. The sizes are ours.
"""

from dataclasses import dataclass, field
from functools import reduce

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from cogvideox_jax.config_keys import AT_LEAST_ZERO, key
from cogvideox_jax.models.precision import exact_in_float32
from cogvideox_jax.models.vae_layers import EPSILON, Carry, Downsample

SLOPE = 0.2  # The slope of the leaky ReLU where its input is negative.


@dataclass(frozen=True)
class DiscriminatorConfig:
  """Sizes of the discriminator."""

  channels: tuple[int, ...] = field(
    metadata=key(
      "Channels of each level. A level halves height and width.", form="hold numbers, as (16, 32)"
    )
  )
  temporal_levels: int = field(
    metadata=key(
      "How many of the first levels see several frames, and halve their number but for the first "
      "frame. 0: each frame is judged alone.",
      allowed=AT_LEAST_ZERO,
    )
  )
  groups: int = field(metadata=key("Groups of the group norms; divides every number of channels."))


class Convolution(nnx.Module):
  """3x3 convolution over space and, if it has time taps, over this and earlier frames.

  Before the first frame it sees copies of it, as the VAE's convolutions do. It is a sum of 2-D
  convolutions, because the gradient of the VAE's own form cannot be differentiated again on a CPU
  without loss of speed, and the gradient penalty needs that.
  """

  def __init__(self, channels: int, out_channels: int, taps: int, *, rngs: nnx.Rngs):
    shape = (taps, 3, 3, channels, out_channels)
    self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))
    self.bias = nnx.Param(jnp.zeros(out_channels))

  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w o"]:
    kernel, frames = self.kernel[...], x.shape[1]
    x = jnp.concatenate([jnp.repeat(x[:, :1], kernel.shape[0] - 1, axis=1), x], axis=1)

    def tap(number: int) -> Float[Array, "bf h w o"]:
      images = rearrange(x[:, number : number + frames], "b f h w c -> (b f) h w c")
      return jax.lax.conv_general_dilated(
        images, kernel[number], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
      )

    total = reduce(jnp.add, map(tap, range(kernel.shape[0])))
    return rearrange(total, "(b f) h w o -> b f h w o", f=frames) + self.bias[...]


class Level(nnx.Module):
  """A residual block of two convolutions, then half the height and width.

  A level that sees time also halves the number of frames, but for an odd first one.
  """

  def __init__(
    self, channels: int, out_channels: int, sees_time: bool, groups: int, *, rngs: nnx.Rngs
  ):
    taps = 3 if sees_time else 1
    self.norm1 = _norm(channels, groups, rngs)
    self.conv1 = Convolution(channels, out_channels, taps, rngs=rngs)
    self.norm2 = _norm(out_channels, groups, rngs)
    self.conv2 = Convolution(out_channels, out_channels, taps, rngs=rngs)
    self.shortcut = nnx.Linear(channels, out_channels, use_bias=False, rngs=rngs)
    self.resample = Downsample(out_channels, sees_time, rngs=rngs)

  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f2 h2 w2 o"]:
    h = self.conv1(_activate(self.norm1(x)))
    h = self.conv2(_activate(self.norm2(h)))
    return self.resample(self.shortcut(x) + h, Carry(None))


class Discriminator(nnx.Module):
  """Judges clips: its logits are high where it takes what it sees for real."""

  def __init__(self, config: DiscriminatorConfig, *, rngs: nnx.Rngs):
    channels = config.channels
    self.conv_in = Convolution(3, channels[0], 1, rngs=rngs)
    self.levels = nnx.List([])
    for i, (width, out) in enumerate(zip((channels[0], *channels), channels, strict=False)):
      sees_time = i < config.temporal_levels
      self.levels.append(Level(width, out, sees_time, config.groups, rngs=rngs))
    self.norm_out = _norm(channels[-1], config.groups, rngs)
    self.conv_out = Convolution(channels[-1], 1, 1, rngs=rngs)

  @exact_in_float32
  def __call__(self, frames: Float[Array, "b F H W 3"]) -> Float[Array, "b f h w"]:
    """Returns a logit for each patch of space and time; frames: in [-1, 1]."""
    x = self.conv_in(frames)
    for level in self.levels:
      x = level(x)
    return self.conv_out(_activate(self.norm_out(x)))[..., 0]


def _norm(channels: int, groups: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
  """Returns a group norm over all frames of a clip."""
  return nnx.GroupNorm(channels, groups, epsilon=EPSILON, use_fast_variance=False, rngs=rngs)


def _activate(x: Float[Array, "..."]) -> Float[Array, "..."]:
  return nnx.leaky_relu(x, SLOPE)
