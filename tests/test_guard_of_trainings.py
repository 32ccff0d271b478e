"""The guard in real trainings: of the transformer on a dataset with a bad clip, and of the VAE."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from small_run import make_config, make_inputs
from stopped_runs import lines, train_and_stop
from test_vae_run import make_config as vae_config

from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.shards import ShardWriter
from cogvideox_jax.training import avoided, transformer_run, vae_run, vae_step
from cogvideox_jax.training.pixels import to_float

FAST = {"validation__every": 0, "checkpoint__every": 20}


def spoil(folder, clip, scale):
  """Writes a dataset again with the latents of one clip multiplied."""
  found = Dataset(folder)
  examples = [found[number] for number in range(len(found))]
  examples[clip] = examples[clip]._replace(mean=np.full_like(examples[clip].mean, scale))
  folder.rmtree()
  writer = ShardWriter(folder, 1, "spoilt")
  writer.write_shard(0, examples)
  writer.finalize()


def events(folder, name):
  return [line for line in lines(folder / "events.jsonl") if line["event"] == name]


@pytest.mark.slow
def test_a_clip_of_huge_latents_moves_no_weight_and_is_avoided_in_the_end(tmp_path, monkeypatch):
  monkeypatch.setattr(avoided, "DELAY", 8)
  inputs = make_inputs(epath.Path(tmp_path), clips=160)
  spoil(inputs / "data" / "tiny", 3, 6e4)
  config = make_config(inputs, train__steps=60, data__validation_fraction=0.0, **FAST)
  folder = epath.Path(tmp_path) / "run"
  train_and_stop(transformer_run.train, config, folder, at=23)
  assert transformer_run.train(config, folder) == 0
  skipped = events(folder, "step_skipped")
  assert len(skipped) >= avoided.STRIKES
  for event in skipped:
    assert "3.mp4" in event["clips"] and len(event["rows"]) == config.stages["tiny"].rows
    assert all(name.endswith("-of-00001") for name in event["files"])
  (left,) = lines(folder / "avoid.jsonl")
  assert left["clip"] == "3.mp4"
  assert max(event["batch"] for event in skipped) < left["from_batch"]
  logged = lines(folder / "metrics.jsonl")
  losses = [line["loss"] for line in logged if line["step"] not in {e["step"] for e in skipped}]
  assert max(losses) < 100
  assert transformer_run.train(config, epath.Path(tmp_path) / "whole") == 0
  for name in ("avoid.jsonl", "suspects.jsonl"):
    assert lines(folder / name) == lines(epath.Path(tmp_path) / "whole" / name)
  ends = [
    json.loads((epath.Path(tmp_path) / run / "checkpoints/60/digests.json").read_text())["arrays"]
    for run in ("run", "whole")
  ]
  assert ends[0] == ends[1]


@pytest.mark.slow
def test_steps_of_the_vae_that_are_not_finite_are_skipped_and_after_some_it_goes_back(
  tmp_path, monkeypatch
):
  assemble, bad, numbers = vae_run.StageRun._assemble, {4, 9, 10}, itertools.count(1)

  def assemble_and_spoil(self, clips, frames):
    return assemble(self, clips, np.zeros_like(frames) if next(numbers) in bad else frames)

  def black_is_odd(frames):
    return jnp.where((frames == 0).all(), jnp.nan, to_float(frames))

  monkeypatch.setattr(vae_run.StageRun, "_assemble", assemble_and_spoil)
  monkeypatch.setattr(vae_step, "to_float", black_is_odd)
  config = vae_config(
    train__steps=12,
    checkpoint__every=2,
    preview__every=0,
    validation__every=0,
    guard__in_a_row=2,
    loss__adversarial=0.1,
  )
  folder = epath.Path(tmp_path)
  assert vae_run.train(config, folder) == 0
  skipped = events(folder, "step_skipped")
  assert [event["step"] for event in skipped] == [4, 9, 10]
  assert all("grad_norm" in event["not_finite"] and event["clips"] for event in skipped)
  (back,) = events(folder, "went_back")
  assert back["back_to"] == 8 and len(back["batches"]) == 2
  assert (folder / "vae").exists()
