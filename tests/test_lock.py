"""requirements-lock.txt names one version, within the bounds, of all that tests and CI install."""

import ast
import re

import make_hashes
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


@pytest.mark.parametrize("file", make_hashes.FILES, ids=lambda file: file.parent.name)
def test_every_package_of_ci_and_of_the_image_has_a_digest_and_the_version_of_the_lock(file):
  lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
  versions = {(normalized(line.name), str(line.specifier)) for line in locked()}
  names = {normalized(line.name) for line in locked()} - {"libtpu"}  # Which jax chooses.
  for line in lines:
    head, *hashes = line.split(" --hash=sha256:")
    assert hashes and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes), line
    requirement = Requirement(head)
    assert requirement.url is None
    pair = (normalized(requirement.name), str(requirement.specifier))
    assert pair in versions or pair[0] not in names, line


@pytest.mark.parametrize("python", PYTHONS)
def test_what_the_tests_install_has_digests_but_for_pytorch(python):
  (file,) = [file for file, extras in make_hashes.FILES.items() if extras == "test,dev"]
  lines = [Requirement(line.split(" --hash")[0]) for line in file.read_text().splitlines()[2:]]
  hashed = {
    normalized(line.name)
    for line in lines
    if line.marker is None or line.marker.evaluate({"python_version": python})
  }
  assert {normalized(Requirement(bound).name) for bound in bounds()} - hashed == {"torch"}


def test_versions_and_digests_that_differ_between_interpreters_are_all_listed():
  found = {
    "3.11": {"jax": ("0.10.2", "a"), "einops": ("0.8.2", "b"), "numpy": ("2.4", "c")},
    "3.12": {"jax": ("0.11.2", "d"), "einops": ("0.8.2", "b"), "numpy": ("2.4", "e")},
  }
  assert make_hashes.lines(found) == [
    "einops==0.8.2 --hash=sha256:b",
    'jax==0.10.2 ; python_version == "3.11" --hash=sha256:a',
    'jax==0.11.2 ; python_version == "3.12" --hash=sha256:d',
    "numpy==2.4 --hash=sha256:c --hash=sha256:e",
  ]


def test_the_image_is_pinned_by_digests():
  text = (make_lock.ROOT / "launch" / "Dockerfile").read_text()
  bases = re.findall(r"^FROM (\S+)", text, flags=re.MULTILINE)
  assert bases and all(re.search("@sha256:[0-9a-f]{64}$", base) for base in bases)
  installs = [line for line in text.splitlines() if "pip install" in line]
  assert installs and all("--require-hashes" in line or "--no-index" in line for line in installs)
