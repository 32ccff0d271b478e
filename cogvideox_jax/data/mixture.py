"""Chooses which dataset each row of training comes from, if there are several with weights.

A run's mixture is its history: from which row on the datasets had which weights, and how many rows
each had given by then. The dataset of any row follows from the history alone, so a checkpoint needs
only the step. The history is a few bytes of JSON, which change only when someone changes the
weights.

Rows are dealt by halving. Of the first n rows, floor(n * share) go to the first half of the
datasets and the others to the second half, and each half deals its rows in the same way. So the
proportions hold over short stretches: of any n consecutive rows, a dataset's number differs from
its share of n by less than 1 row if there are two datasets, 2 rows if there are four, 3 if there
are eight. The fractions are exact, so nothing drifts.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

Weights = Mapping[str, int | float]  # Dataset -> share of the rows, times any factor; 0 is none.


class Stretch(NamedTuple):
  """Consecutive rows that are mixed with the same weights."""

  start: int  # Its first row, counted over the whole training. It ends where the next one starts.
  weights: dict[str, int | float]
  offsets: dict[str, int]  # How many rows each dataset gave before it; 0 if it is not named.


History = tuple[Stretch, ...]  # The first starts at row 0.


def begin(weights: Weights) -> History:
  """Returns the history of a training that begins. At least one weight must be above 0."""
  return (Stretch(0, dict(weights), {}),)


def go_on(history: History, weights: Weights, row: int) -> History:
  """Returns the history of a training that goes on at `row` with these weights."""
  past = tuple(stretch for stretch in history if stretch.start < row)
  if not past:
    return begin(weights)
  if past[-1].weights == dict(weights):
    return past
  return (*past, Stretch(row, dict(weights), given(past, row)))


def locate(history: History, row: int) -> tuple[str, int]:
  """Returns the dataset that a row of the training comes from, and the row's number in it."""
  before, after = given(history, row), given(history, row + 1)
  name = next(name for name, rows in after.items() if rows > before.get(name, 0))
  return name, before.get(name, 0)


def given(history: History, row: int) -> dict[str, int]:
  """Returns how many of the training's first `row` rows come from each dataset."""
  stretch = next((one for one in reversed(history) if one.start < row), history[0])
  names = sorted(stretch.weights)
  weights = [Fraction(str(stretch.weights[name])) for name in names]
  rows = _deal(row - stretch.start, weights)
  return stretch.offsets | {
    name: stretch.offsets.get(name, 0) + count for name, count in zip(names, rows, strict=True)
  }


def _deal(rows: int, weights: Sequence[Fraction]) -> list[int]:
  """Returns how many of the first `rows` rows each weight gets.

  One row more gives exactly one of them one row more.
  """
  if len(weights) == 1 or not rows:
    return [rows] + [0] * (len(weights) - 1)
  half = len(weights) // 2
  first = int(rows * sum(weights[:half]) // sum(weights))
  return _deal(first, weights[:half]) + _deal(rows - first, weights[half:])
