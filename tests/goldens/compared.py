"""What a comparison is made of, and its tolerances.

In float32: networks 2e-5 when they are fed the stored timestep sinusoid, whose rounding takes 2e-4;
the VAE 2e-5, or 4 times what the reference's float32 differs from its float64; schedulers and
tables 1e-5; whole pipelines 2e-4.
"""

import math
from typing import Any, NamedTuple

import numpy as np

NETWORK, SINUSOID, EXACT, PIPELINE = 2e-5, 2e-4, 1e-5, 2e-4


class Compared(NamedTuple):
  """One of our arrays, laid out as the reference's of that name."""

  tensor: str  # What follows a space says how it was computed.
  ours: Any
  tolerance: float

  @property
  def key(self) -> str:
    """The reference's name."""
    return self.tensor.split(" ")[0]


class Result(NamedTuple):
  """How a comparison went."""

  case: str
  tensor: str
  error: float  # The largest; nan where shapes differ, or a number is not finite.
  floor: float | None  # How far the reference's float32 is from its float64, if that is known.
  tolerance: float

  @property
  def passed(self) -> bool:
    return self.error <= self.tolerance  # False for nan.


def failed(case: str, reason: str) -> Result:
  """The result of a case or tensor that could not be compared."""
  return Result(case, reason, math.nan, None, 0.0)


def largest_error(ours: Any, theirs: np.ndarray) -> float:
  ours = np.asarray(ours)
  if ours.shape != theirs.shape:
    return math.nan
  with np.errstate(invalid="ignore"):
    difference = np.abs(np.float64(ours) - np.float64(theirs))
  return float(difference.max(initial=0.0))  # nan if any is.
