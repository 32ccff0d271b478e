"""The forms of the VAE's convolution: they agree, and each device gets its own."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogvideox_jax.models import convolution


@pytest.mark.parametrize(
  "form", [convolution._convolve_by_taps, convolution._convolve_by_pairs, convolution.convolve]
)
@pytest.mark.parametrize(
  "frames", [1, 4, 5]
)  # Output frames; an odd number is no whole number of pairs.
def test_all_forms_of_the_convolution_agree_in_values_and_gradients(form, frames):
  x = jax.random.normal(jax.random.key(0), (2, frames + 2, 5, 4, 3))
  kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 3, 4))

  @partial(jax.jit, static_argnums=0)
  def run(form):
    def loss(x, kernel):
      return jnp.sin(form(x, kernel)).sum()

    return form(x, kernel), jax.grad(loss, (0, 1))(x, kernel)

  ours, expected = run(form), run(convolution._convolve_3d)
  assert ours[0].shape == (2, frames, 5, 4, 4)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), ours, expected)


def test_pairs_of_frames_are_about_as_exact_as_the_taps():
  x = np.random.default_rng(0).standard_normal((1, 10, 8, 8, 32))
  kernel = np.random.default_rng(1).standard_normal((3, 3, 3, 32, 32))
  with jax.enable_x64(True):
    exact = np.asarray(convolution._convolve_3d(jnp.asarray(x), jnp.asarray(kernel)))
  error = {
    form: np.linalg.norm(np.asarray(form(jnp.float32(x), jnp.float32(kernel))) - exact)
    for form in (convolution._convolve_by_taps, convolution._convolve_by_pairs)
  }
  assert error[convolution._convolve_by_pairs] < 2 * error[convolution._convolve_by_taps]


def test_the_form_of_the_convolution_follows_from_the_platform_that_is_compiled_for():
  def convolved_frames(platform, frames=4, dtype=jnp.float32):
    x = jax.ShapeDtypeStruct((1, frames + 2, 8, 8, 8), dtype)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 8, 8), dtype)
    lowered = jax.jit(convolution.convolve).trace(x, kernel).lower(lowering_platforms=(platform,))
    convolutions = re.findall(r"stablehlo.convolution.*-> tensor<(\d+)x(\d+)", lowered.as_text())
    return [int(size if size != "1" else frames) for size, frames in convolutions]

  assert convolved_frames("cuda") == [4]
  assert convolved_frames("tpu") == [4, 4, 4]
  assert convolved_frames("cpu") == [2, 2, 2, 2]
  assert len(convolved_frames("cpu", frames=1)) == 3
  assert convolved_frames("cpu", dtype=jnp.bfloat16) == [4, 4, 4]
