"""A killed run, started again, ends as one that was never killed: bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath
from small_run import make_inputs, settings

ROOT = Path(__file__).parent.parent
STEPS = 40


@pytest.fixture
def start(tmp_path):
  """Starts the command line on a workdir, on one device."""
  inputs = make_inputs(epath.Path(tmp_path))
  values = settings(inputs, train__steps=STEPS, checkpoint__every=5, validation__every=0)
  environment = os.environ | {"XLA_FLAGS": ""}

  def run(workdir):
    command = [sys.executable, "-m", "cogvideox_jax.train", "--config=configs/tiny.py"]
    command += [f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in values.items())]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)

  return run


def lines(path):
  """Whole lines only: the last may still be on its way."""
  text = path.read_text() if path.exists() else ""
  return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def saved(workdir):
  events = lines(workdir / "events.jsonl")
  return {e["step"]: e["digest"] for e in events if e["event"] == "checkpoint_saved"}


def kill_once_saved(process, workdir):
  deadline = time.monotonic() + 300
  while not saved(workdir) and process.poll() is None and time.monotonic() < deadline:
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL


def finish(process):
  out, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors
  return out


def test_a_run_killed_and_started_again_ends_as_one_never_killed(start, tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  kill_once_saved(start(killed), killed)
  last = max(saved(killed))
  printed = finish(start(killed))
  finish(start(whole))
  resumed = [e["step"] for e in lines(killed / "events.jsonl") if e["event"] == "resumed"]
  assert len(resumed) == 2 and 0 < last <= resumed[1] < STEPS
  assert f"resumed at step {resumed[1]} of {STEPS}" in printed

  assert saved(killed)[STEPS] == saved(whole)[STEPS]  # Weights, average, moments and step.
  common = saved(killed).keys() & saved(whole).keys()
  assert all(saved(killed)[step] == saved(whole)[step] for step in common)
  losses = [
    {line["step"]: (line["loss"], line["learning_rate"]) for line in lines(run / "metrics.jsonl")}
    for run in (killed, whole)
  ]
  assert list(losses[0]) == list(range(1, STEPS + 1))
  assert losses[0] == losses[1]
