"""The files that only grow."""

import json
import time

import jax.numpy as jnp
import pytest
from etils import epath
from tqdm import tqdm

from cogvideox_jax.errors import UserError
from cogvideox_jax.training import metrics


@pytest.fixture
def log(tmp_path):
  log = metrics.RunLog(epath.Path(tmp_path))
  yield log
  log.close()


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def recorder_of(log, *, lag, every=1, describe=None):
  report = metrics.Report("test", 10, ("loss",), every, way_out="Give up.")
  report = report._replace(describe=describe) if describe else report
  return metrics.Recorder(log, tqdm(disable=True), report, lag=lag)


def test_lines_can_be_read_as_soon_as_they_are_added(log, tmp_path):
  log.event("resumed", step=0)
  log.metrics(1, {"loss": 0.5})
  assert lines(tmp_path / "events.jsonl") == [{"event": "resumed", "step": 0}]
  assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
  assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("torn", ["", '{"step": 3, "lo'])
def test_a_line_torn_by_a_kill_is_cut_off_at_the_next_start(tmp_path, torn):
  whole = '{"step": 1}\n{"step": 2}\n'
  (tmp_path / "metrics.jsonl").write_text(whole + torn)
  log = metrics.RunLog(epath.Path(tmp_path))
  log.metrics(3, {})
  log.close()
  assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_logged_step_stands_for_those_before_it(log, tmp_path, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, "perf_counter", lambda: now[0])

  def measure():
    now[0] += 100  # What is not a step's time.
    return {"validation_loss": 1.0}

  def describe(step, seconds):
    return {"described_step": step, "steps_per_second": 1 / seconds}

  recorder = recorder_of(log, lag=0, every=3, describe=describe)
  for step in range(1, 7):
    now[0] += step
    recorder.add(step, {"loss": jnp.float32(step)}, measure if step == 5 else None)
  logged = lines(tmp_path / "metrics.jsonl")
  assert [line["step"] for line in logged] == [3, 5, 6]
  assert [line["step_seconds"] for line in logged] == [2, 4.5, 6]
  assert [line["steps_per_second"] for line in logged] == [1 / 2, 1 / 4.5, 1 / 6]
  assert [line["described_step"] for line in logged] == [3, 5, 6]
  assert ["validation_loss" in line for line in logged] == [False, True, False]


def test_numbers_are_read_late_and_none_is_lost(log, tmp_path):
  recorder = recorder_of(log, lag=2)
  seen = []
  for step in range(1, 5):
    recorder.add(step, {"loss": jnp.float32(1)})
    seen.append((tmp_path / "metrics.jsonl").exists() and len(lines(tmp_path / "metrics.jsonl")))
  assert seen == [0, 0, 1, 2]
  recorder.drain()
  assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_number_that_is_not_finite_stops_the_run_and_names_the_step(log, tmp_path, value):
  recorder = recorder_of(log, lag=0, every=10)
  recorder.add(1, {"loss": jnp.float32(1), "grad_norm": jnp.float32(1)})
  with pytest.raises(UserError, match=r"at step 2: grad_norm not finite(.|\n)*Give up\."):
    recorder.add(2, {"loss": jnp.float32(1), "grad_norm": jnp.float32(value)})
  stop = {"event": "not_finite", "step": 2, "metrics": ["grad_norm"]}
  assert lines(tmp_path / "events.jsonl") == [stop]


def test_a_loss_that_is_not_finite_names_the_clips_of_its_batch(log, tmp_path):
  recorder = recorder_of(log, lag=0)
  recorder._report = recorder._report._replace(clips=lambda step: [f"{step}.mp4", "b.mp4"])
  with pytest.raises(UserError, match=r"events\.jsonl names the 2 clips of its batch"):
    recorder.add(4, {"loss": jnp.float32(jnp.nan)})
  found = {"event": "not_finite", "step": 4, "metrics": ["loss"], "clips": ["4.mp4", "b.mp4"]}
  assert lines(tmp_path / "events.jsonl") == [found]
