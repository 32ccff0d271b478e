"""LPIPS, the perceptual distance of two pictures (arXiv:1801.03924, version 0.1 of its package).

Both pictures go through a classifier's convolutions. At five depths the feature vector of each
place is scaled to length 1. The squared differences of the two pictures' vectors are weighed by
channel and averaged over places, and the five averages are summed.

The parameters are a tree of float32 arrays, which `evaluation/lpips_weights.py` loads:

  features/I/conv/kernel  [height, width, input, output] of convolution I, counted from 0
  features/I/conv/bias    [output]
  heads/J/scale           [channels], the weights of depth J; none is negative
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cogvideox_jax.errors import UserError
from cogvideox_jax.models.precision import exact_in_float32
from cogvideox_jax.types import Params

# What the package takes from the pixels in [-1, 1], and divides them by, for red, green and blue.
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
# Added to the squared length of a feature vector. The package adds 1e-10 to the length instead,
# and then the gradient at a vector of zeros is not a number. The values differ by 3e-8 at most.
EPSILON = 1e-20


class Backbone(NamedTuple):
  """The convolutions of a classifier, each with a ReLU after it."""

  channels: tuple[int, ...]  # That each convolution gives.
  kernels: tuple[int, ...]  # The side of each.
  strides: tuple[int, ...]
  paddings: tuple[int, ...]
  pooled: frozenset[int]  # The convolutions whose input is halved by a maximum.
  compared: tuple[int, ...]  # The convolutions whose features are compared.
  pool: Callable[[Array], Array]
  smallest: int  # The least height and width in pixels that leave features at every depth.


def _max_of_squares(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
  """The maximum of each 2x2 square, without an odd last row or column.

  Slices, because the gradient of XLA's pooling scatters, which is slow on CPUs.
  """
  height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
  corners = (x[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1))
  a, b, c, d = corners
  return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


def _max_of_nine(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
  """The maximum of each 3x3 window, at every second place."""
  return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")


BACKBONES = {
  "vgg16": Backbone(
    channels=(64, 64, 128, 128, *(256,) * 3, *(512,) * 6),
    kernels=(3,) * 13,
    strides=(1,) * 13,
    paddings=(1,) * 13,
    pooled=frozenset({2, 4, 7, 10}),
    compared=(1, 3, 6, 9, 12),
    pool=_max_of_squares,
    smallest=16,
  ),
  "alexnet": Backbone(
    channels=(64, 192, 384, 256, 256),
    kernels=(11, 5, 3, 3, 3),
    strides=(4, 1, 1, 1, 1),
    paddings=(2, 2, 1, 1, 1),
    pooled=frozenset({1, 2}),
    compared=(0, 1, 2, 3, 4),
    pool=_max_of_nine,
    smallest=31,
  ),
}


class TooSmallError(UserError):
  """Pictures are smaller than a network of LPIPS can compare."""


def check_size(network: str, height: int, width: int) -> None:
  """Raises TooSmallError for pictures that are smaller than the network can compare."""
  smallest = BACKBONES[network].smallest
  if min(height, width) < smallest:
    raise TooSmallError(
      f"LPIPS with {network} compares pictures of at least {smallest} pixels a side, not "
      f"{height}x{width}."
    )


def lpips(
  params: Params,
  x: Float[Array, "*b H W 3"],
  y: Float[Array, "*b H W 3"],
  *,
  network: str = "vgg16",
) -> Float[Array, "*b"]:
  """Returns the LPIPS of each pair of pictures or frames, 0 for equal ones.

  A pure function, to be jitted and differentiated with respect to x, y and params; its gradient is
  finite everywhere. If y does not depend on what is differentiated, its features cost one forward
  pass. The gradient with respect to x costs another pass of about the same size.

  Args:
    params: what `evaluation.lpips_weights.lpips_params(network)` loads. In a training state they
      are frozen.
    x, y: in [-1, 1]. They may be bfloat16; lengths and differences are computed in float32.
    network: a key of BACKBONES. VGG16 is the one that training minimizes; the package
      advises AlexNet for evaluation.

  Raises:
    TooSmallError: the pictures are smaller than the network can compare.
  """
  check_size(network, *x.shape[-3:-1])
  pictures = x.shape[:-3]
  x, y = (z.reshape(-1, *z.shape[-3:]) for z in (x, y))
  distance = jnp.zeros(len(x), jnp.float32)
  for head, of_x, of_y in zip(
    _in_order(params["heads"]),
    features(params, x, network),
    features(params, y, network),
    strict=True,
  ):
    difference = jnp.square(_unit(of_x) - _unit(of_y))
    distance += (difference * head["scale"].astype(jnp.float32)).sum(axis=-1).mean(axis=(1, 2))
  return distance.reshape(pictures)


def abstract_params(network: str) -> Params:
  """Returns the shapes of the parameters; `network`: a key of BACKBONES."""
  backbone = BACKBONES[network]

  def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  inputs = (3, *backbone.channels)
  features = {
    str(i): {"conv": {"kernel": array(side, side, inputs[i], out), "bias": array(out)}}
    for i, (side, out) in enumerate(zip(backbone.kernels, backbone.channels, strict=True))
  }
  heads = {str(j): {"scale": array(backbone.channels[i])} for j, i in enumerate(backbone.compared)}
  return {"features": features, "heads": heads}


def features(params: Params, x: Float[Array, "b H W 3"], network: str) -> list[Array]:
  """Returns the features of pictures in [-1, 1] at the depths that are compared."""
  return _features(params, (x - SHIFT.astype(x.dtype)) / SCALE.astype(x.dtype), network)


@exact_in_float32
def _convolve(conv: Params, x: Array, stride: int, padding: int) -> Array:
  y = jax.lax.conv_general_dilated(
    x,
    conv["kernel"].astype(x.dtype),
    (stride, stride),
    [(padding, padding)] * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  return y + conv["bias"].astype(x.dtype)


def _features(params: Params, x: Array, network: str) -> list[Array]:
  backbone, found = BACKBONES[network], []
  for number, layer in enumerate(_in_order(params["features"])):
    if number in backbone.pooled:
      x = backbone.pool(x)
    stride, padding = backbone.strides[number], backbone.paddings[number]
    x = jax.nn.relu(_convolve(layer["conv"], x, stride, padding))
    if number in backbone.compared:
      found.append(x)
  return found


def _in_order(layers: Params) -> list[Params]:
  return [layers[str(number)] for number in range(len(layers))]


def _unit(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
  """Scales each feature vector to length 1; a vector of zeros stays one."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + EPSILON)
