"""Rows are dealt out to datasets in proportion, over any stretch, and none is lost or repeated."""

import math
from collections import Counter

import numpy as np
import pytest

from cogvideox_jax.data import mixture

WEIGHTS = [
  {"a": 1},
  {"a": 0.3, "b": 0.7},
  {"a": 1, "b": 1, "c": 1},
  {"a": 5, "b": 0.1, "c": 2, "d": 1e-3},
  {"a": 1, "b": 0, "c": 2, "d": 3, "e": 7, "f": 0.25, "g": 11, "h": 1},
]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("start", [0, 10**12])
def test_every_window_holds_the_datasets_in_proportion(weights, start):
  history = mixture.begin(weights)
  names = [mixture.locate(history, row)[0] for row in range(start, start + 300)]
  bound = max(math.ceil(math.log2(len(weights))), 1)
  total = sum(weights.values())
  for name, weight in weights.items():
    counts = np.cumsum([0] + [one == name for one in names])
    for length in (1, 2, 5, 10, 64, 300):
      windows = counts[length:] - counts[:-length]
      assert np.abs(windows - length * weight / total).max() < bound, (name, length)


def test_decimal_weights_are_exact():
  history = mixture.begin({"a": 0.7, "b": 0.3})
  for row in (10, 10**6, 10**15):
    assert mixture.given(history, row) == {"a": row * 7 // 10, "b": row * 3 // 10}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_dataset_gives_its_rows_in_turn(weights):
  history = mixture.begin(weights)
  counts = Counter()
  for row in range(500):
    name, number = mixture.locate(history, row)
    assert number == counts[name]
    counts[name] += 1
  assert mixture.given(history, 500) == {name: counts[name] for name in weights}
  assert not any(counts[name] for name, weight in weights.items() if not weight)


def test_the_order_in_which_datasets_are_named_does_not_matter():
  forwards, backwards = ({name: ord(name) for name in names} for names in ("abcde", "edcba"))
  rows = range(100)
  assert [mixture.locate(mixture.begin(forwards), row) for row in rows] == [
    mixture.locate(mixture.begin(backwards), row) for row in rows
  ]


def test_a_change_of_weights_keeps_every_datasets_place():
  changes = [(0, {"a": 1, "b": 3}), (17, {"a": 2, "b": 1}), (30, {"c": 1}), (41, {"a": 1, "c": 1})]
  history = mixture.begin(changes[0][1])
  for row, weights in changes[1:]:
    history = mixture.go_on(history, weights, row)
  counts = Counter()
  for row in range(80):
    name, number = mixture.locate(history, row)
    assert number == counts[name]
    counts[name] += 1
    (weights,) = [
      w for (start, w), end in zip(changes, (17, 30, 41, 80), strict=True) if start <= row < end
    ]
    assert name in weights
  assert history[-1].offsets == dict(Counter(mixture.locate(history, r)[0] for r in range(41)))


def test_going_on_with_the_same_weights_changes_nothing():
  history = mixture.begin({"a": 1, "b": 3})
  assert mixture.go_on(history, {"b": 3, "a": 1}, 100) == history
  changed = mixture.go_on(history, {"a": 1}, 100)
  assert mixture.go_on(changed, {"a": 1}, 120) == changed
  assert mixture.go_on(changed, {"a": 1}, 100) == changed


def test_weights_hold_from_where_a_run_goes_on():
  """A run that falls back before a change of weights has not yet seen it."""
  history = mixture.begin({"a": 1, "b": 3})
  changed = mixture.go_on(history, {"a": 1}, 100)
  assert mixture.go_on(changed, {"a": 1, "b": 3}, 100) == history
  assert mixture.go_on(changed, {"b": 1}, 80)[0] == history[0]
  assert [stretch.start for stretch in mixture.go_on(changed, {"b": 1}, 80)] == [0, 80]
  assert mixture.go_on(changed, {"b": 1}, 0) == mixture.begin({"b": 1})
