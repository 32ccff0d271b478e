"""I3D, the video classifier whose logits FVD compares (arXiv:1705.07750; Kinetics-400, RGB).

Inception inflated to three dimensions. Padding is TensorFlow's SAME, and batch norm uses the
statistics of its training, with Sonnet's epsilon and without a scale.
"""

from functools import reduce

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cogvideox_jax.models.convolution import convolve
from cogvideox_jax.models.precision import exact_in_float32

EPSILON = 1e-3  # Sonnet's. The PyTorch ports of cd-fvd and others have 1e-5.
SIZE = 224  # Pixels of a side.
MIN_FRAMES = 9  # Eight leave one frame before the average over two.
CLASSES = 400
WIDTHS = {  # Channels of an inception's six convolutions.
  "mixed_3b": (64, 96, 128, 16, 32, 32),
  "mixed_3c": (128, 128, 192, 32, 96, 64),
  "mixed_4b": (192, 96, 208, 16, 48, 64),
  "mixed_4c": (160, 112, 224, 24, 64, 64),
  "mixed_4d": (128, 128, 256, 24, 64, 64),
  "mixed_4e": (112, 144, 288, 32, 64, 64),
  "mixed_4f": (256, 160, 320, 32, 128, 128),
  "mixed_5b": (256, 160, 320, 32, 128, 128),
  "mixed_5c": (384, 192, 384, 48, 128, 128),
}
# The layer before which the features are pooled: the windows and the strides over time and space.
POOLED = {"mixed_3b": ((1, 3), (1, 2)), "mixed_4b": ((3, 3), (2, 2)), "mixed_5b": ((2, 2), (2, 2))}


class Unit(nnx.Module):
  """A convolution, batch norm, and ReLU."""

  def __init__(self, channels: int, out: int, size: int, epsilon: float, *, rngs: nnx.Rngs):
    shape = (size, size, size, channels, out)
    self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))
    self.bias = nnx.Param(jnp.zeros(out))
    self.mean = nnx.Param(jnp.zeros(out))
    self.variance = nnx.Param(jnp.ones(out))
    self.epsilon = epsilon

  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f2 h2 w2 o"]:
    x = self._convolve(x)
    scale = jax.lax.rsqrt(self.variance[...] + self.epsilon)
    return nnx.relu((x - self.mean[...]) * scale + self.bias[...])

  def _convolve(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f2 h2 w2 o"]:
    kernel = self.kernel[...]
    if len(kernel) == 1:
      return x @ kernel[0, 0, 0]
    return convolve(jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0))), kernel)


class Stem(Unit):
  """The first convolution, of 7x7x7 and stride 2, as a sum of one over images for each time tap.

  XLA's convolution in three dimensions is several times slower on CPUs.
  """

  def _convolve(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f2 h2 w2 o"]:
    kernel = self.kernel[...]
    taps, frames = len(kernel), -(-x.shape[1] // 2)
    missing = max(2 * (frames - 1) + taps - x.shape[1], 0)
    x = jnp.pad(x, ((0, 0), (missing // 2, -(-missing // 2)), (0, 0), (0, 0), (0, 0)))

    def convolve_frames(tap: int) -> Array:
      images = x[:, tap : tap + 2 * frames - 1 : 2]
      y = jax.lax.conv_general_dilated(
        images.reshape(-1, *images.shape[2:]),
        kernel[tap],
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
      )
      return y.reshape(*images.shape[:2], *y.shape[1:])

    return reduce(jnp.add, map(convolve_frames, range(taps)))


class Inception(nnx.Module):
  """Four branches, whose channels are put one after the other."""

  def __init__(self, channels: int, widths: tuple[int, ...], epsilon: float, *, rngs: nnx.Rngs):
    alone, before_1, after_1, before_2, after_2, pooled = widths
    self.branch_0 = Unit(channels, alone, 1, epsilon, rngs=rngs)
    self.branch_1a = Unit(channels, before_1, 1, epsilon, rngs=rngs)
    self.branch_1b = Unit(before_1, after_1, 3, epsilon, rngs=rngs)
    self.branch_2a = Unit(channels, before_2, 1, epsilon, rngs=rngs)
    self.branch_2b = Unit(before_2, after_2, 3, epsilon, rngs=rngs)
    self.branch_3 = Unit(channels, pooled, 1, epsilon, rngs=rngs)

  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w o"]:
    branches = (
      self.branch_0(x),
      self.branch_1b(self.branch_1a(x)),
      self.branch_2b(self.branch_2a(x)),
      self.branch_3(max_pool(x, (3, 3), (1, 1))),
    )
    return jnp.concatenate(branches, axis=-1)


class I3D(nnx.Module):
  """The network up to its logits. The parameters are those of `evaluation/i3d_weights.py`."""

  def __init__(self, epsilon: float = EPSILON, *, rngs: nnx.Rngs):
    self.conv_1a = Stem(3, 64, 7, epsilon, rngs=rngs)
    self.conv_2b = Unit(64, 64, 1, epsilon, rngs=rngs)
    self.conv_2c = Unit(64, 192, 3, epsilon, rngs=rngs)
    self.mixed = nnx.Dict({})
    channels = 192
    for name, widths in WIDTHS.items():
      self.mixed[name] = Inception(channels, widths, epsilon, rngs=rngs)
      channels = sum(widths[i] for i in (0, 2, 4, 5))
    self.logits = nnx.Linear(channels, CLASSES, rngs=rngs)

  @exact_in_float32
  def __call__(self, x: Float[Array, "b F 224 224 3"]) -> Float[Array, "b 400"]:
    """Returns the logits of clips of at least MIN_FRAMES frames in [-1, 1], averaged over time."""
    x = self.conv_1a(x)
    x = self.conv_2c(self.conv_2b(max_pool(x, (1, 3), (1, 2))))
    for name in WIDTHS:
      if name in POOLED:
        x = max_pool(x, *POOLED[name])
      x = self.mixed[name](x)
    x = x.mean(axis=(2, 3))  # 7x7 places.
    x = (x[:, :-1] + x[:, 1:]) / 2
    return self.logits(x).mean(axis=1)


def max_pool(
  x: Float[Array, "b f h w c"], windows: tuple[int, int], strides: tuple[int, int]
) -> Float[Array, "b f2 h2 w2 c"]:
  """The maximum over windows of time and space, with padding SAME.

  One axis at a time: a window of three axes has 27 numbers, three windows of one have 9.
  """
  for axis, kind in ((1, 0), (2, 1), (3, 1)):
    window, stride = [1] * 5, [1] * 5
    window[axis], stride[axis] = windows[kind], strides[kind]
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, stride, "SAME")
  return x


def resize(x: Float[Array, "b F H W 3"]) -> Float[Array, "b F 224 224 3"]:
  """Brings frames to 224x224 as PyTorch's F.interpolate does: bilinear, without antialiasing."""
  shape = (*x.shape[:2], SIZE, SIZE, 3)
  return jax.image.resize(x, shape, "bilinear", antialias=False)
