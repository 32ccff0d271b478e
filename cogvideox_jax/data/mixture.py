"""Which dataset each row of training comes from, where there are several with weights.

A run's mixture is its history: from which row on the datasets had which weights, and how many
rows each had given by then. Any row follows from it alone, so a checkpoint needs no more than the
step, and the history is a few bytes of JSON that change only when someone changes the weights.

Rows are dealt out by halving: of the first n rows, floor(n * share) go to the first half of the
datasets, the others to the second, and each half deals out its own in the same way. So proportions
hold over short windows: of any n rows in turn, a dataset gives its share of n to less than 1 row
where there are two datasets, 2 rows where there are four, 3 where there are eight. The fractions
are exact, so that nothing drifts.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

Weights = Mapping[str, int | float]  # Dataset -> share of the rows, times any number; 0 is none.


class Stretch(NamedTuple):
  """A run of rows that were mixed with the same weights."""

  start: int  # Its first row, counted over the whole training; it ends where the next one starts.
  weights: dict[str, int | float]
  offsets: dict[str, int]  # Rows that every dataset had given before it; 0 where not named.


History = tuple[Stretch, ...]  # The first starts at row 0.


def begin(weights: Weights) -> History:
  """The history of a training that begins; one weight at least is above 0."""
  return (Stretch(0, dict(weights), {}),)


def go_on(history: History, weights: Weights, row: int) -> History:
  """The history of a training that goes on at `row`, with these weights from there on."""
  past = tuple(stretch for stretch in history if stretch.start < row)
  if not past:
    return begin(weights)
  if past[-1].weights == dict(weights):
    return past
  return (*past, Stretch(row, dict(weights), given(past, row)))


def place(history: History, row: int) -> tuple[str, int]:
  """The dataset that a row of the training comes from, and which row of it that is, from 0."""
  before, after = given(history, row), given(history, row + 1)
  name = next(name for name, rows in after.items() if rows > before.get(name, 0))
  return name, before.get(name, 0)


def given(history: History, row: int) -> dict[str, int]:
  """How many of the training's first `row` rows came from each dataset."""
  stretch = next((one for one in reversed(history) if one.start < row), history[0])
  names = sorted(stretch.weights)
  weights = [Fraction(str(stretch.weights[name])) for name in names]
  rows = _deal(row - stretch.start, weights)
  return stretch.offsets | {
    name: stretch.offsets.get(name, 0) + count for name, count in zip(names, rows, strict=True)
  }


def _deal(rows: int, weights: Sequence[Fraction]) -> list[int]:
  """How many of the first `rows` rows each weight gets; one more row gives one of them one more."""
  if len(weights) == 1 or not rows:
    return [rows] + [0] * (len(weights) - 1)
  half = len(weights) // 2
  first = int(rows * sum(weights[:half]) // sum(weights))
  return _deal(first, weights[:half]) + _deal(rows - first, weights[half:])
