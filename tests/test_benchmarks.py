"""The benchmarks run and print what their readers ask for. What is fast is not tested here."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
def test_the_vae_is_compared_with_diffusers():
  size = ["--sizes=5x16x16", "--channels", "64", "64", "64", "64", "--repeats=1"]
  command = [sys.executable, str(BENCHMARKS / "vae.py"), "--json", *size]
  run = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=True)

  result = json.loads(run.stdout.splitlines()[-1])
  (case,) = result["cases"]
  assert {"device", "jax", "torch", "diffusers", "on", "torch_on", "threads"} <= result.keys()
  assert [case[side] for side in ("frames", "height", "width")] == [5, 16, 16]
  assert case["seconds"].keys() == case["memory"].keys()
  assert max(case["outputs_differ"].values()) < 1e-4
  assert case["ratios"].keys() == {"torch_encode", "torch_decode"}
  for name, ratio in case["ratios"].items():
    ours = case["seconds"][name.replace("torch", "ours")]
    assert math.isclose(ratio, case["seconds"][name] / ours)
