"""People train on eight clips, too: what few clips cannot give turns itself off with a line."""

import dataclasses

import numpy as np
import pytest
from drawn_dataset import make_dataset
from etils import epath
from small_run import make_config, make_inputs, write_dataset

from cogvideox_jax.config.schema import SourceConfig
from cogvideox_jax.data.clips import are_held_out, source_hash
from cogvideox_jax.data.rows import EmptySplitError
from cogvideox_jax.training import stage_data, stages
from cogvideox_jax.training.transformer_run import StageRun
from configs import tiny, vae_tiny


def hashes(*names):
  return np.array([source_hash(name) for name in names], np.uint64)


def test_of_a_single_file_nothing_is_held_out_by_chance():
  name = next(f"{n}.mp4" for n in range(1000) if source_hash(f"{n}.mp4") < 0.02 * 2.0**64)
  assert not are_held_out(hashes(name), 0.02).any()
  assert not are_held_out(hashes(f"{name}#0", f"{name}#1"), 0.02).any()
  other = next(f"{n}.mp4" for n in range(1000) if source_hash(f"{n}.mp4") > 0.5 * 2.0**64)
  assert are_held_out(hashes(name, other), 0.02).tolist() == [True, False]
  assert are_held_out(hashes(name), 0.9).all()  # What was asked for.


def run(config, folder):
  return StageRun(config, stages.named(config, "tiny"), epath.Path(folder), "zeros", None)


def test_without_a_held_out_clip_there_is_no_validation_and_a_line(tmp_path, capsys):
  inputs = make_inputs(epath.Path(tmp_path), clips=24)
  config = make_config(inputs, data__validation_fraction=0.001)
  stage = run(config, tmp_path)
  assert stage._held_out is None
  rows = stage_data.make_rows(config, "tiny", {"": stage.datasets[0]}, "train", "zeros")
  assert len(rows[""].clips) == 24  # They are trained on, all of them.
  (line,) = capsys.readouterr().out.splitlines()
  assert "None of the 24 clips of" in line and "config.data.validation_fraction=0.001" in line


def test_a_small_dataset_of_a_mixture_does_not_stop_the_validation_of_the_others(tmp_path, capsys):
  inputs = make_inputs(epath.Path(tmp_path))
  write_dataset(inputs / "small", 1, clips=1)
  config = make_config(inputs)
  mixture = {
    "large": SourceConfig(str(inputs / "data" / "tiny"), 1.0),
    "small": SourceConfig(str(inputs / "small"), 1.0),
  }
  data = dataclasses.replace(config.data, path="", mixture=mixture)
  stage = run(dataclasses.replace(config, data=data), tmp_path)
  assert stage._held_out is not None and list(stage._held_out.epochs(0)) == ["large"]
  (line,) = capsys.readouterr().out.splitlines()
  assert "None of the 1 clips of" in line and "small" in line


def test_an_empty_split_has_an_error_of_its_own(tmp_path):
  dataset = make_dataset(tmp_path, range(3))
  with pytest.raises(EmptySplitError):
    stage_data.Rows(
      dataset,
      row_tokens=20,
      max_clips=1,
      patch=(1, 2, 2),
      seed=0,
      drop="zeros",
      drop_rate=0.0,
      validation_fraction=0.0,
    )


def test_the_small_configs_warm_up_over_a_share_of_any_number_of_steps():
  for config, steps, peak_at in ((tiny, 1600, 50), (vae_tiny, 1500, 100)):
    wanted = config.get_config().optimizer.warmup_steps
    assert 0 < wanted < 1 and round(wanted * steps, 6) == peak_at
  few = make_config(epath.Path("."), train__steps=20)
  few = dataclasses.replace(
    few,
    optimizer=dataclasses.replace(
      few.optimizer, warmup_steps=tiny.get_config().optimizer.warmup_steps
    ),
  )
  rate = stages.learning_rate(few, "tiny")
  assert float(rate(0)) == pytest.approx(few.optimizer.learning_rate)
