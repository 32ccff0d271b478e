"""requirements-lock.txt names one version, within the bounds, of all that tests and CI install."""

import ast
import re

import make_lock
import pytest
from packaging.requirements import Requirement

PYTHONS = ("3.11", "3.12")


def bounds() -> list[str]:
  """The core's dependencies and those of the extras `test` and `dev`."""
  core = (make_lock.ROOT / "requirements.txt").read_text().splitlines()
  tree = ast.parse((make_lock.ROOT / "setup.py").read_text())
  (extras,) = [
    ast.literal_eval(node.value)
    for node in tree.body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS"
  ]
  wanted = [*core, *extras["test"], *extras["dev"]]
  return [line for line in wanted if line and not line.startswith("#")]


def locked() -> list[Requirement]:
  lines = make_lock.LOCK.read_text().splitlines()
  return [Requirement(line) for line in lines if not line.startswith("#")]


def normalized(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("bound", bounds())
def test_each_dependency_has_one_locked_version_within_its_bounds(bound, python):
  wanted = Requirement(bound)
  (version,) = [
    next(iter(line.specifier)).version
    for line in locked()
    if normalized(line.name) == normalized(wanted.name)
    and (line.marker is None or line.marker.evaluate({"python_version": python}))
  ]
  assert wanted.specifier.contains(version)


def test_the_lock_holds_versions_and_no_addresses():
  for line in locked():
    assert line.url is None and len(line.specifier) == 1
    assert next(iter(line.specifier)).operator == "=="
  assert "://" not in make_lock.LOCK.read_text() and "--" not in make_lock.LOCK.read_text()


def test_a_version_that_differs_between_interpreters_gets_a_line_for_each():
  found = {
    "3.11": {"jax": "0.10.2", "einops": "0.8.2", "backport": "1.0"},
    "3.12": {"jax": "0.11.2", "einops": "0.8.2"},
  }
  assert make_lock.lines(found) == [
    'backport==1.0 ; python_version == "3.11"',
    "einops==0.8.2",
    'jax==0.10.2 ; python_version == "3.11"',
    'jax==0.11.2 ; python_version == "3.12"',
  ]
