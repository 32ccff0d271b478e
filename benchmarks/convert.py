"""Memory and time to convert a transformer of real size, with random weights, from disk to disk.

python benchmarks/convert.py --json [--config=configs/5b.py] [--scratch=DIR]

Needs three times the model's size on the disk. The memory is `RssAnon` of the converting process
and its child processes. It leaves out the pages of mapped files, which the operating system may
drop.
"""

import itertools
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from cogvideox_jax.config.read import read
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.conversion import diffusers, tensors
from cogvideox_jax.conversion.components import TRANSFORMER
from cogvideox_jax.models.dit_config import DiTConfig

sys.path.append(str(Path(__file__).parent.parent))  # Configs say `from configs import base`.
CONFIG = config_flags.DEFINE_config_file("config", "configs/5b.py", "Whose model is converted.")
SCRATCH = flags.DEFINE_string("scratch", None, "Folder for the models; by default a temporary one.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object as the last line.")
LAYOUTS = ("diffusers", "orbax", "diffusers", "sat", "diffusers")  # Each from the one before.
POLL_SECONDS = 0.02


class Random(tensors.Tensors):
  """A model's tensors with random values, generated when they are read."""

  def __init__(self, config: DiTConfig):
    rows, shapes = TRANSFORMER.rows(config), TRANSFORMER.shapes(config)
    self._shapes = {slot.name: slot.shape for slot in tensors.slots(rows, shapes)}

  def spec(self, name: str) -> tensors.Spec:
    return tensors.Spec(np.dtype(ml_dtypes.bfloat16), self._shapes[name])

  def __getitem__(self, name: str) -> np.ndarray:
    rng = np.random.default_rng(abs(hash(name)))
    numbers = rng.standard_normal(self._shapes[name], np.float32) * 0.02
    return numbers.astype(ml_dtypes.bfloat16)

  def __iter__(self):
    return iter(self._shapes)

  def __len__(self) -> int:
    return len(self._shapes)


def write_source(folder: Path, config: DiTConfig) -> int:
  """Writes a model folder that holds only a transformer. Returns the bytes of its weights."""
  found, part = Random(config), folder / "transformer"
  diffusers.write_weights(part, TRANSFORMER.weights, found)
  diffusers.write_fields(part, diffusers.CONFIG, TRANSFORMER.write_config(config))
  return sum(found.spec(name).nbytes for name in found)


def convert(source: Path, target: Path, layout: str) -> dict[str, float]:
  """Runs the command. Returns its seconds and peak anonymous memory, with child processes."""
  command = [sys.executable, "-m", "cogvideox_jax.convert"]
  command += [f"--source={source}", f"--target={target}", f"--format={layout}"]
  start, peak = time.perf_counter(), 0
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
  while process.poll() is None:
    peak = max(peak, sum(map(anonymous_bytes, family(process.pid))))
    time.sleep(POLL_SECONDS)
  if process.returncode:
    raise SystemExit(f"{' '.join(command)} failed")
  return {"peak_anonymous_bytes": peak, "seconds": time.perf_counter() - start}


def family(pid: int) -> list[int]:
  """The ids of a process and of all its descendants."""
  found = [pid]
  for parent in found:
    try:
      children = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    except OSError:
      continue  # The process has ended.
    found += map(int, children.split())
  return found


def anonymous_bytes(pid: int) -> int:
  try:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
  except OSError:
    return 0
  return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def same_weights(a: Path, b: Path) -> bool:
  """Whether two folders of safetensors hold the same bits."""
  config = TRANSFORMER.read_config(*diffusers.read_fields(a / "transformer", diffusers.CONFIG))
  first, second = (
    TRANSFORMER.as_file(diffusers.open_weights(TRANSFORMER, x / "transformer", config), config)
    for x in (a, b)
  )
  return all(
    np.array_equal(first[name].view(np.uint16), second[name].view(np.uint16)) for name in first
  )


def main(_) -> None:
  config = read(TrainConfig, CONFIG.value).model
  with tempfile.TemporaryDirectory(dir=SCRATCH.value) as scratch:
    first = source = Path(scratch) / "source"
    result: dict[str, object] = {"machine": platform.machine()}
    result["weights_bytes"] = write_source(first, config)
    for number, (old, new) in enumerate(itertools.pairwise(LAYOUTS)):
      target = Path(scratch) / f"{number}_{new}"
      result[f"{old}_to_{new}"] = convert(source, target, new)
      if new == "diffusers":
        result[f"bit_equal_by_{old}"] = same_weights(first, target)
      if source != first:
        shutil.rmtree(source)
      source = target
  print(json.dumps(result) if JSON.value else json.dumps(result, indent=2))


if __name__ == "__main__":
  app.run(main)
