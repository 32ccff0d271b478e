"""Scores over seeds: what they resolve, and what they leave open."""

import math

import pytest

from cogvideox_jax.evaluation.seed_statistics import Claim, judge, summarize

CLAIM = Claim("8 channels", "16 channels", "psnr")


def verdict(lower, higher):
  return judge(CLAIM, {"8 channels": summarize(lower), "16 channels": summarize(higher)})


def test_a_summary_has_the_unbiased_deviation_of_a_run():
  summary = summarize([1.0, 2.0, 4.0])
  assert summary.mean == pytest.approx(7 / 3)
  assert summary.deviation == pytest.approx(math.sqrt(7 / 3))
  assert summary.seeds == 3


@pytest.mark.parametrize(
  ("lower", "higher", "resolved"),
  [
    ([20.0, 20.2, 19.8], [21.0, 21.2, 20.8], True),  # 1 against 2 x 0.283.
    ([20.0, 20.2, 19.8], [20.5, 20.7, 20.3], False),  # 0.5 against 2 x 0.283.
    ([21.0, 21.2, 20.8], [20.0, 20.2, 19.8], False),  # The wrong way.
    ([20.0], [30.0], False),  # One seed shows no noise, so nothing is known of it.
  ],
)
def test_a_claim_holds_if_the_difference_exceeds_two_of_its_deviations(lower, higher, resolved):
  found = verdict(lower, higher)
  assert found.is_resolved is resolved
  assert ("holds" if resolved else "not resolved") in str(found)
  assert "psnr of 8 channels < 16 channels" in str(found)
