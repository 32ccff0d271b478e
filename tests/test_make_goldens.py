"""The documented command makes the reference tensors of this folder again."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from goldens.compared import NETWORK, PIPELINE
from goldens.folder import Folder
from goldens.runner import run
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow  # Half a minute for the folder, minutes for its cases.

ROOT = Path(__file__).parent.parent
TREE = Folder(ROOT / "tests" / "data" / "goldens")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Folder:
  """What the command of CONTRIBUTING.md makes."""
  text = (ROOT / "CONTRIBUTING.md").read_text()
  match = re.search(r"^python (tests/make_goldens\.py (.*\\\n)*.*)$", text, re.MULTILINE)
  arguments = shlex.split(match[1].replace("\\\n", " "))
  folder = tmp_path_factory.mktemp("made") / "goldens"
  arguments[arguments.index("--out") + 1] = str(folder)
  subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)
  return Folder(folder)


@pytest.mark.parametrize("name", TREE.names)
def test_every_case_passes(made, name):
  results = run(made, name)
  assert results
  assert not [result for result in results if not result.passed]


def test_the_same_cases_are_made(made):
  assert made.names == TREE.names
  assert made.index["models"] == TREE.index["models"]


def tensors_of(folder: Folder, kind: str) -> dict[tuple[str, str], np.ndarray]:
  files = sorted((folder.path / kind).rglob("*.safetensors"))
  return {
    (file.relative_to(folder.path).as_posix(), name): x
    for file in files
    for name, x in load_file(file).items()
  }


@pytest.mark.parametrize("kind", ["models", "pipelines", "lora", "sat"])
def test_weights_are_made_again_bit_by_bit(made, kind):
  ours, theirs = tensors_of(made, kind), tensors_of(TREE, kind)
  assert ours.keys() == theirs.keys()
  for name, x in ours.items():
    np.testing.assert_array_equal(x, theirs[name], str(name), strict=True)


def test_tensors_are_made_again_up_to_rounding(made):
  ours, theirs = tensors_of(made, "cases"), tensors_of(TREE, "cases")
  assert ours.keys() == theirs.keys()
  for (file, name), x in ours.items():
    drawn = name.startswith("rng.") or x.dtype.kind == "i"
    tolerance = 0 if drawn else PIPELINE if "/pipe_" in file else NETWORK
    expected = theirs[file, name]
    np.testing.assert_allclose(x, expected, rtol=0, atol=tolerance, err_msg=f"{file} {name}")
    assert x.dtype == expected.dtype
