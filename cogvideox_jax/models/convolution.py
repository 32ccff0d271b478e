"""The VAE's 3-D convolution, in the form that is fastest on each kind of device."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float


@jax.custom_vjp
def convolve(
  x: Float[Array, "b f h w c"], kernel: Float[Array, "kt kh kw c o"]
) -> Float[Array, "b f2 h w o"]:
  """3-D convolution, zero-padded in space and not in time: `f2 = f - kt + 1`.

  On TPUs it is the sum of one 2-D convolution for each time tap, because XLA's 3-D convolution is
  slower by a third to a half there (the compiler's estimate: benchmarks/vae.md). On CPUs, where
  XLA's is several times slower, four 2-D convolutions serve each pair of frames: they take about .6
  of the time of the taps' six, and less memory (on TPUs not compared). Elsewhere XLA's is fastest.
  The form is chosen when a program is lowered, so that a CPU host compiles a GPU's form for a GPU.
  """
  return jax.lax.platform_dependent(
    x, kernel, cpu=_convolve_by_pairs, tpu=_convolve_by_taps, default=_convolve_3d
  )


def _convolve_forward(x, kernel):
  return convolve(x, kernel), (x, kernel)


def _convolve_backward(saved, gradient):
  # Each direction chooses the form itself, because the derivative of `platform_dependent` leaves a
  # branch in the program, which XLA runs on one CPU thread, 20 times slower (measured).
  def pull_back(form, x, kernel, gradient):
    return jax.vjp(form, x, kernel)[1](gradient)

  return jax.lax.platform_dependent(
    *saved,
    gradient,
    cpu=partial(pull_back, _convolve_by_pairs),
    tpu=partial(pull_back, _convolve_by_taps),
    default=partial(pull_back, _convolve_3d),
  )


def _convolve_3d(x, kernel):
  pad = [(0, 0), *((k // 2, k // 2) for k in kernel.shape[1:3])]
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1, 1), pad, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
  )


def _convolve_by_taps(x, kernel):
  taps, frames = kernel.shape[0], x.shape[1] - kernel.shape[0] + 1

  def convolve_frames(tap: int) -> Array:
    return _convolve_images(_images(x[:, tap : tap + frames]), kernel[tap])

  total = reduce(jnp.add, map(convolve_frames, range(taps)))
  return rearrange(total, "(b f) h w c -> b f h w c", f=frames)


def _convolve_by_pairs(x, kernel):
  """Winograd's F(2, 3) over time: each pair of frames takes four convolutions instead of six.

  Its factors are 1 and 1/2, so that it is about as exact as the taps (benchmarks/vae.md). It is
  not used in bfloat16, which would round the sums of frames before they are multiplied, nor for a
  single frame.
  """
  frames = x.shape[1] - kernel.shape[0] + 1
  if frames == 1 or x.dtype == jnp.bfloat16:
    return _convolve_by_taps(x, kernel)
  x = jnp.pad(x, ((0, 0), (0, frames % 2), (0, 0), (0, 0), (0, 0)))
  # The four frames that each pair depends on.
  a, b, c, d = x[:, :-2:2], x[:, 1:-2:2], x[:, 2::2], x[:, 3::2]
  first, middle, last = kernel
  ends = (first + last) / 2
  begin, plus, minus, end = (
    _convolve_images(_images(of_frames), of_taps)
    for of_frames, of_taps in (
      (a - c, first),
      (c + b, ends + middle / 2),
      (c - b, ends - middle / 2),
      (b - d, last),
    )
  )
  pairs = jnp.stack([begin + plus + minus, plus - minus - end], axis=1)
  return rearrange(pairs, "(b f) two h w c -> b (f two) h w c", b=x.shape[0])[:, :frames]


def _images(x):
  return rearrange(x, "b f h w c -> (b f) h w c")


def _convolve_images(images, kernel):
  pad = [(k // 2, k // 2) for k in kernel.shape[:2]]
  return jax.lax.conv_general_dilated(
    images, kernel, (1, 1), pad, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


convolve.defvjp(_convolve_forward, _convolve_backward)
