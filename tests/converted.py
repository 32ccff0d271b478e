"""Runs the verb `convert` in a test, and compares what it writes."""

import json
from pathlib import Path

import numpy as np
from absl import flags
from absl.testing import flagsaver
from safetensors.numpy import load_file

from cogvideox_jax import convert

if not flags.FLAGS.is_parsed():
  flags.FLAGS.mark_as_parsed()


def run(source, target, layout, **others) -> Path:
  values = {"source": str(source), "target": str(target), "format": layout, **others}
  with flagsaver.flagsaver(**values):
    convert.main()
  return Path(target)


def weights(folder: Path) -> dict[str, np.ndarray]:
  """Every tensor of a folder of safetensors, by file and name."""
  return {
    f"{file.parent.name}/{name}": tensor
    for file in sorted(folder.glob("*/*.safetensors"))
    for name, tensor in load_file(file).items()
  }


def json_files(folder: Path) -> dict[str, dict]:
  names = ("config.json", "scheduler_config.json", "model_index.json")
  files = [file for name in names for file in folder.rglob(name)]
  return {str(file.relative_to(folder)): json.loads(file.read_text()) for file in files}


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]):
  assert ours.keys() == theirs.keys()
  for name, tensor in ours.items():
    assert tensor.dtype == theirs[name].dtype, name
    np.testing.assert_array_equal(tensor.view(np.uint8), theirs[name].view(np.uint8), name)
