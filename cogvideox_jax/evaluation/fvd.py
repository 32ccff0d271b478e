"""FVD, the Fréchet distance of two sets of clips (arXiv:1812.01717): logits of I3D, and the figure.

Implementations differ in the epsilon of batch norm, the resizing, the covariance and the clips, and
their figures cannot be compared. So each figure comes with a line that says all of this.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from cogvideox_jax.errors import UserError
from cogvideox_jax.evaluation.i3d_weights import i3d_params
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.i3d import EPSILON, I3D, MIN_FRAMES, resize
from cogvideox_jax.types import Params

MIN_CLIPS = 2  # One clip has no covariance.
FEW_CLIPS = 256  # Below this the figure says little: it falls as clips are added.


class TooShortError(UserError):
  """Clips have too few frames for I3D."""


class Features:
  """I3D on this host's first device."""

  def __init__(self, epsilon: float = EPSILON):
    """Loads the network.

    Raises:
      MissingPackageError, UserError: as `i3d_params`.
    """
    self.epsilon = epsilon
    self._params = jax.device_put(i3d_params())
    self._run = jax.jit(partial(_logits, graph=graph_of(I3D, epsilon)))

  def __call__(self, frames: UInt8[np.ndarray, "b F H W 3"]) -> Float[np.ndarray, "b 400"]:
    """Returns the logits of clips of any size.

    Raises:
      TooShortError: they have fewer than nine frames.
    """
    check_frames(frames.shape[1])
    return np.asarray(self._run(self._params, frames))

  def flavour(self, clips: int, frames: int, fps: float, windows: str, biased: bool) -> str:
    """Returns the line that says how a figure was computed.

    Args:
      windows: which clips of a file were taken: "first frames" or "windows".
    """
    mantissa, exponent = f"{self.epsilon:.0e}".split("e")
    covariance = "biased" if biased else "unbiased"
    return (
      f"i3d-logits, eps {mantissa}e{int(exponent)}, bilinear without antialias to 224², 2x/255-1, "
      f"{clips} clips, {frames} frames, {fps:g} fps, {windows}, {covariance} covariance"
    )


def check_frames(frames: int) -> None:
  """Raises TooShortError if clips are too short for I3D."""
  if frames < MIN_FRAMES:
    raise TooShortError(
      f"FVD needs clips of at least {MIN_FRAMES} frames, not {frames}: I3D halves time three times "
      "and then averages two neighbours."
    )


def _logits(
  params: Params, frames: UInt8[Array, "b F H W 3"], *, graph: nnx.GraphDef
) -> Float[Array, "b 400"]:
  pixels = resize(frames.astype(jnp.float32)) * (2 / 255) - 1
  return nnx.merge(graph, params)(pixels)


class Fvd(NamedTuple):
  """A figure, and what a reader must know about it."""

  distance: float
  warning: str  # Empty if there are clips enough.


def fvd(
  x: Float[np.ndarray, "n classes"], y: Float[np.ndarray, "m classes"], *, biased: bool = False
) -> Fvd:
  """Returns the Fréchet distance of two normal distributions with the features' moments.

  |mean x - mean y|² + tr(Cx + Cy - 2 (Cx Cy)^½), in float64. With centred features X and Y, the
  trace of the root is the sum of the singular values of X Yᵀ, over the root of the two
  denominators. This is exact where Cx or Cy is singular, as with fewer clips than features.

  Args:
    biased: divides the covariances by the number of clips, as cd-fvd does; else by one less, as
      Google's code does.

  Raises:
    UserError: a set has fewer than two clips.
  """
  clips = min(len(x), len(y))
  if clips < MIN_CLIPS:
    raise UserError(f"FVD needs at least {MIN_CLIPS} clips, not {clips}: one has no covariance.")
  if not (np.isfinite(x).all() and np.isfinite(y).all()):
    raise UserError("FVD is not defined: the features of a clip are not finite.")
  mean_x, x = _centred(x, biased)
  mean_y, y = _centred(y, biased)
  root = np.linalg.svd(_narrow(x) @ _narrow(y).T, compute_uv=False).sum()
  distance = np.square(mean_x - mean_y).sum() + np.square(x).sum() + np.square(y).sum() - 2 * root
  few = (
    f"FVD of {clips} clips, fewer than {FEW_CLIPS}: it falls as clips are added, so compare it "
    "only with figures of the same clips."
  )
  # Rounding may leave a distance of zero slightly below it.
  return Fvd(max(float(distance), 0.0), few if clips < FEW_CLIPS else "")


def _centred(x: np.ndarray, biased: bool) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean, and the centred rows, scaled so that XᵀX is the covariance."""
  x = x.astype(np.float64)
  mean = x.mean(axis=0)
  return mean, (x - mean) / np.sqrt(len(x) - (not biased))


def _narrow(x: np.ndarray) -> np.ndarray:
  """Returns a matrix of at most as many rows as columns with the same XᵀX."""
  return np.linalg.qr(x).R if len(x) > x.shape[1] else x
