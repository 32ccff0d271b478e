"""Mistakes of a user, made with the real commands: told in a few lines, before any compile."""

import re
from functools import partial
from pathlib import Path

import pytest
from commands import Result, run_command
from model_folder import make_model
from small_run import config_flags_of, make_config, make_inputs, settings

from cogvideox_jax.config.read import to_json

TINY = "--config=configs/tiny.py"


@pytest.fixture
def run(tmp_path):
  return partial(run_command, tmp_path, log_compiles=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return make_model(tmp_path_factory.mktemp("model"))


def small(inputs: Path, **changes) -> list[str]:
  return [TINY, *config_flags_of(settings(inputs, **changes))]


def check_mistake(result: Result, *words: str) -> None:
  """Exit code 2, and up to 8 lines that hold the words; no step was compiled."""
  assert result.code == 2, result.errors
  logged = re.compile(r"W\d{4} .*(Compiling|Finished|cache)")
  lines = result.errors.splitlines()
  assert len([line for line in lines if not logged.match(line)]) <= 8, result.errors
  for word in words:
    assert word in result.errors
  assert "Traceback" not in result.errors
  compiled = [line for line in lines if "Compiling" in line]
  # What is compiled to split a seed takes integers.
  assert not [line for line in compiled if re.search(r"ShapedArray\(b?float\d+\[\d", line)]


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"model__dpeth": 2}, ["--config.model.dpeth=2", '"depth"']),
    ({"train__steps": "many"}, ["--config.train.steps=many", "int"]),
    ({"train__steps": 0}, ["config.train.steps", "above 0"]),
    ({"stages__tiny__durations": "(1,10)"}, ["config.stages.tiny", "10", "9"]),
    ({"stages__tiny__sizes": "((64,68),)"}, ["config.stages.tiny", "68"]),
    ({"stages__tiny__rows": 3, "mesh__data": 1}, ["config.mesh", "8 devices"]),
    ({"stages__tiny__rows": 12}, ["rows", "12", "8"]),
    ({"stages__tiny__row_tokens": 8}, ["row_tokens", "8"]),
    ({"sharding": "zero3"}, ["config.sharding", "zero3", "fsdp"]),
    ({"data__path": "nowhere"}, ["nowhere", "encode"]),
    ({"components": "nowhere"}, ["nowhere", "tiny"]),
    ({"init_from": "nowhere"}, ["nowhere"]),
    ({"optimizer__warmup_steps": 60}, ["config.optimizer.warmup_steps", "60"]),
  ],
  ids=str,
)
def test_training_refuses(run, inputs, tmp_path, changes, words):
  result = run("train", *small(inputs, **changes), f"--workdir={tmp_path / 'run'}")
  check_mistake(result, *words)


def test_training_refuses_the_workdir_of_another_config(run, inputs, tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "config.json").write_text(to_json(make_config(inputs, seed=1)))
  result = run("train", *small(inputs), f"--workdir={workdir}")
  check_mistake(result, str(workdir), "config.seed: was 1, is 0", "init_from")


def test_training_refuses_a_workdir_that_is_a_file(run, inputs, tmp_path):
  (tmp_path / "file").write_text("")
  result = run("train", *small(inputs), f"--workdir={tmp_path / 'file'}")
  check_mistake(result, str(tmp_path / "file"))


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--model=nowhere"], ["nowhere", "tiny"]),
    (["--num_frames=16"], ["16", "17"]),
    (["--width=63"], ["width", "63"]),
    (["--steps=0"], ["steps", "0"]),
    (["--steps=0.5"], ["--steps=0.5", "int"]),
    (["--output=video.avi"], ["video.avi", "mp4"]),
  ],
  ids=str,
)
def test_sampling_refuses(run, tmp_path, model, args, words):
  given = [f"--model={model}", "--prompt=a red circle", f"--output={tmp_path / 'out.mp4'}", *args]
  check_mistake(run("sample", *given), *words)


@pytest.mark.parametrize("name", ["empty", "nowhere"])
def test_encoding_refuses_what_holds_no_clips(run, tmp_path, name):
  (tmp_path / "empty").mkdir()
  args = [f"--input={tmp_path / name}", f"--output={tmp_path / 'encoded'}", "--model=tiny"]
  check_mistake(run("encode", TINY, *args), name)
