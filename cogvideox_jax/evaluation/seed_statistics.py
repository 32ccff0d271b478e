"""Sums up scores over seeds, and says which differences they resolve."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

DEVIATIONS = 2.0  # A difference counts if it exceeds so many of its standard deviations.


class Summary(NamedTuple):
  """A score over seeds."""

  mean: float
  deviation: float  # The standard deviation of one run, unbiased; NaN for one seed.
  seeds: int


class Claim(NamedTuple):
  """That one variant scores less than another."""

  lower: str
  higher: str
  score: str


class Verdict(NamedTuple):
  """What the scores say of a claim."""

  claim: Claim
  difference: float  # Mean of the higher one minus that of the lower one.
  deviation: float  # That of the difference of one run of each.

  @property
  def is_resolved(self) -> bool:
    """Whether the claim holds beyond the noise of seeds. Never with one seed."""
    return self.difference > DEVIATIONS * self.deviation

  def __str__(self) -> str:
    found = f"{self.difference:+.3f}, standard deviation {self.deviation:.3f}"
    name = f"{self.claim.score} of {self.claim.lower} < {self.claim.higher}"
    return f"{name}: {'holds' if self.is_resolved else 'not resolved'} ({found})"


def summarize(scores: Sequence[float]) -> Summary:
  """Returns the mean and standard deviation of a score over seeds."""
  deviation = statistics.stdev(scores) if len(scores) > 1 else math.nan
  return Summary(statistics.fmean(scores), deviation, len(scores))


def judge(claim: Claim, summaries: Mapping[str, Summary]) -> Verdict:
  """Compares the two variants of a claim.

  Args:
    summaries: of the claim's score, by variant.
  """
  lower, higher = summaries[claim.lower], summaries[claim.higher]
  deviation = math.hypot(lower.deviation, higher.deviation)
  return Verdict(claim, higher.mean - lower.mean, deviation)
