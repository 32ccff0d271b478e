"""Trainings in tests: what they log, and how they are stopped."""

import json
import os
import signal

import pytest

from cogvideox_jax.training import metrics


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def digests(workdir):
  events = lines(workdir / "events.jsonl")
  return {e["step"]: e["digest"] for e in events if e["event"] == "checkpoint_saved"}


def train_and_stop(train, config, workdir, at):
  """Trains by `train` until a signal comes after a step."""
  add = metrics.Recorder.add

  def add_and_signal(self, step, values, measure):
    add(self, step, values, measure)
    if step == at:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(metrics.Recorder, "add", add_and_signal)
    assert train(config, workdir) == 83
