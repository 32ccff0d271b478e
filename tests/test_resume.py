"""A killed run, started again, ends as one that was never killed: bit for bit."""

import itertools
import json
import os
import signal

import pytest
from commands import OWN_DEVICES, Running, start_command
from etils import epath
from small_run import config_flags_of, make_config, make_inputs, settings
from waiting import wait_until

from cogvideox_jax.training import metrics, transformer_run

STEPS = 40


@pytest.fixture
def start(tmp_path):
  """Starts the command on a workdir, on as many devices as its config says."""
  inputs = make_inputs(epath.Path(tmp_path))
  values = settings(inputs, train__steps=STEPS, validation__every=0)
  runs = itertools.count()

  def run(workdir, save_every=STEPS // 2):
    said = tmp_path / f"said_{next(runs)}"
    said.mkdir()
    changes = config_flags_of({**values, "checkpoint.every": save_every})
    flags = ["--config=configs/tiny.py", f"--workdir={workdir}", *changes]
    return start_command(said, "train", *flags, xla_flags=OWN_DEVICES)

  return run


def lines(path):
  """Whole lines only: the last may still be on its way."""
  text = path.read_text() if path.exists() else ""
  return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def saved(workdir):
  events = lines(workdir / "events.jsonl")
  return {e["step"]: e["digest"] for e in events if e["event"] == "checkpoint_saved"}


def kill_once_saved(process, workdir):
  wait_until(lambda: saved(workdir), runs=lambda: process.poll() is None)
  process.send_signal(signal.SIGKILL)
  assert process.wait().code == -signal.SIGKILL


def finish(process):
  ended = process.wait()
  assert ended.code == 0, ended.errors
  return ended.output


def train_until_killed(inputs, workdir, at):
  """Trains, and kills its own process after a step, while a save of the step before may go on."""
  add = metrics.Recorder.add

  def add_and_die(self, step, values, measure):
    add(self, step, values, measure)
    if step == at:
      os.kill(os.getpid(), signal.SIGKILL)

  metrics.Recorder.add = add_and_die
  transformer_run.train(make_config(inputs), workdir)


def test_a_run_killed_and_started_again_has_the_weights_of_one_never_killed(finished_run, tmp_path):
  inputs, whole = finished_run
  workdir = epath.Path(tmp_path) / "run"
  assert Running(tmp_path, train_until_killed, inputs, workdir, 5).wait().code == -signal.SIGKILL
  assert max(saved(workdir)) in (2, 4)
  assert transformer_run.train(make_config(inputs), workdir) == 0
  assert saved(workdir)[6] == saved(whole)[6]
  losses = [
    {line["step"]: line["loss"] for line in lines(run / "metrics.jsonl")}
    for run in (workdir, whole)
  ]
  assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.slow
def test_a_command_killed_at_any_time_and_started_again_ends_as_one_never_killed(start, tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  kill_once_saved(start(killed, save_every=5), killed)
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
