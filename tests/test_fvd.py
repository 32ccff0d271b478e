"""I3D and FVD: reference figures, and what the distance must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from cogvideox_jax.errors import UserError
from cogvideox_jax.evaluation.fvd import Features, TooShortError, fvd
from cogvideox_jax.models import graphs
from cogvideox_jax.models.i3d import I3D, Stem, max_pool, resize


def squared_distance(features: Features, frames: int) -> float:
  """Between a black and a white clip. They are plain, so a small size is resized to the same."""
  black, white = (np.full((1, frames, 8, 8, 3), byte, np.uint8) for byte in (0, 255))
  return float(np.square(features(black) - features(white)).sum())


@pytest.mark.parametrize(
  ("epsilon", "frames", "golden"),
  [
    (1e-3, 15, 133.908),
    pytest.param(1e-3, 16, 152.90, marks=pytest.mark.slow),
    pytest.param(1e-5, 15, 134.214, marks=pytest.mark.slow),
  ],
)
def test_i3d_gives_the_reference_figures(epsilon, frames, golden):
  found = squared_distance(Features(epsilon), frames)
  assert found == pytest.approx(golden, abs=0.0006 if frames == 15 else 0.006)


def test_i3d_has_the_layers_of_the_package():
  _, params = graphs.abstract(I3D, 1e-3)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 12_704_544
  assert len(jax.tree.leaves(params)) == 230


@pytest.mark.parametrize("frames", [5, 8])
@pytest.mark.parametrize("side", [14, 17])
def test_the_stem_is_a_convolution_in_three_dimensions(frames, side):
  stem = Stem(3, 4, 7, 1e-3, rngs=nnx.Rngs(0))
  x = nnx.Rngs(1).normal((2, frames, side, side, 3))
  whole = jax.lax.conv_general_dilated(
    x, stem.kernel[...], (2, 2, 2), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
  )
  np.testing.assert_allclose(stem._convolve(x), whole, atol=1e-5)


def test_pooling_is_that_of_three_axes_at_once():
  x = nnx.Rngs(0).normal((1, 5, 7, 8, 2))
  for windows, strides in [((3, 3), (2, 2)), ((1, 3), (1, 2)), ((2, 2), (2, 2)), ((3, 3), (1, 1))]:
    (t, s), (dt, ds) = windows, strides
    whole = jax.lax.reduce_window(
      x, -jnp.inf, jax.lax.max, (1, t, s, s, 1), (1, dt, ds, ds, 1), "SAME"
    )
    np.testing.assert_array_equal(max_pool(x, windows, strides), whole)


@pytest.mark.parametrize("size", [(480, 720), (64, 64), (300, 200)])
def test_frames_are_resized_as_pytorch_does(size):
  x = np.random.RandomState(0).uniform(-1, 1, (1, 2, *size, 3)).astype(np.float32)
  images = torch.from_numpy(x[0]).permute(0, 3, 1, 2)
  wanted = torch.nn.functional.interpolate(images, (224, 224), mode="bilinear", align_corners=False)
  np.testing.assert_allclose(resize(jnp.asarray(x))[0], wanted.permute(0, 2, 3, 1), atol=1e-5)


def drawn(clips: int, seed: int = 0, width: int = 400) -> np.ndarray:
  """Features that are correlated, as real ones are."""
  draws = np.random.RandomState(seed)
  return (draws.normal(size=(clips, 20)) @ draws.normal(size=(20, width)) / 5
          + draws.normal(size=(clips, width)) + 3).astype(np.float32)  # fmt: skip


@pytest.mark.parametrize("clips", [2, 30, 80])  # Fewer or more than the features.
def test_the_distance_of_a_set_from_itself_is_zero(clips):
  assert fvd(drawn(clips, width=50), drawn(clips, width=50)).distance < 1e-3


@pytest.mark.parametrize(("x", "y"), [(30, 30), (30, 40), (80, 30), (70, 80)])
def test_the_distance_is_symmetric(x, y):
  x, y = drawn(x, 0, 50), drawn(y, 1, 50)
  there, back = fvd(x, y).distance, fvd(y, x).distance
  assert there > 1 and there == pytest.approx(back, rel=1e-9)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("clips", [12, 60])
def test_the_distance_is_that_of_the_roots_of_covariances(biased, clips):
  x, y = drawn(clips, 0, 20), drawn(clips + 3, 1, 20)
  x[:, :5], y[:, :7] = 1, 2  # Singular in any case.
  of_x, of_y = (np.cov(z.T.astype(np.float64), bias=biased) for z in (x, y))
  values, vectors = np.linalg.eigh(of_x)
  half = vectors * np.sqrt(values.clip(0)) @ vectors.T
  root = np.linalg.eigvalsh(half @ of_y @ half).clip(0)
  means = np.square(x.mean(0, np.float64) - y.mean(0, np.float64)).sum()
  wanted = means + np.trace(of_x) + np.trace(of_y) - 2 * np.sqrt(root).sum()
  assert fvd(x, y, biased=biased).distance == pytest.approx(wanted, rel=1e-5)


def test_the_distance_falls_when_noise_falls():
  x = drawn(40)
  noise = np.random.RandomState(2).normal(size=x.shape)
  found = [fvd(x, x + strength * noise).distance for strength in (2, 1, 0.5, 0.1, 0)]
  assert found == sorted(found, reverse=True) and found[-1] < 1e-3


def test_few_clips_are_warned_of_and_one_is_refused():
  assert "FVD of 255 clips, fewer than 256" in fvd(drawn(300), drawn(255)).warning
  assert not fvd(drawn(256), drawn(256)).warning
  for x, y in [(1, 300), (300, 1), (0, 0)]:
    with pytest.raises(UserError, match="at least 2 clips"):
      fvd(drawn(x), drawn(y))


def test_features_that_are_not_finite_are_refused():
  x = drawn(3)
  x[1, 7] = np.nan
  with pytest.raises(UserError, match="not finite"):
    fvd(x, drawn(3))


def test_short_clips_are_refused_before_anything_is_compiled():
  features = Features()
  with pytest.raises(TooShortError, match="at least 9 frames, not 8"):
    features(np.zeros((1, 8, 8, 8, 3), np.uint8))


def test_a_figure_says_how_it_was_computed():
  assert Features(1e-3).flavour(300, 17, 8.0, "first frames", False) == (
    "i3d-logits, eps 1e-3, bilinear without antialias to 224², 2x/255-1, 300 clips, 17 frames, "
    "8 fps, first frames, unbiased covariance"
  )
  assert "eps 1e-5" in Features(1e-5).flavour(2, 9, 29.97, "windows", True)
  assert (
    Features(1e-5)
    .flavour(2, 9, 29.97, "windows", True)
    .endswith("2 clips, 9 frames, 29.97 fps, windows, biased covariance")
  )
