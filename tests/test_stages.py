"""Progressive training: what each stage takes of a run, and that a run goes through all of them."""

import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from model_folder import make_model
from small_run import settings, write_dataset

from cogvideox_jax.data.loader import Loader
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.errors import UserError
from cogvideox_jax.models import positions
from cogvideox_jax.training import checkpoint, inspection, loop, metrics, setup, stages, workdir
from cogvideox_jax.training.state import TrainState
from configs import base, tiny_stages

GRIDS = {  # Latent frames, height, width; the largest side doubles, and doubles again.
  "stage1": ((1, 2, 2), (3, 2, 2)),
  "stage2": ((1, 4, 4), (3, 4, 2)),
  "stage3": ((3, 8, 4), (3, 4, 8)),
}
CLIPS = 40
ROWS = {"stage1": (16, 32), "stage2": (8, 40), "stage3": (8, 64), "stage4": (8, 64)}
ENDS = {"stage1": 4, "stage2": 6, "stage3": 8, "stage4": 10}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  """FOLDER/data, a dataset of each stage but the last, and FOLDER/model, of drawn weights."""
  folder = epath.Path(tmp_path_factory.mktemp("inputs"))
  for seed, (stage, grids) in enumerate(GRIDS.items()):
    scores = np.random.default_rng(seed).permutation(CLIPS)
    write_dataset(folder / "data" / stage, seed, CLIPS, grids, scores)
  make_model(folder / "model")
  return folder


def make_config(inputs, only=(), **changes):
  """Small stages of ten updates in all; `only` the named ones."""
  config = tiny_stages.get_config()
  values = {k: v for k, v in settings(inputs).items() if not k.startswith("stages.")}
  for stage, (rows, tokens) in ROWS.items():
    values |= {f"stages.{stage}.rows": rows, f"stages.{stage}.row_tokens": tokens}
    grids = GRIDS[config.stages[stage].data or stage]
    values[f"stages.{stage}.sizes"] = tuple((4 * h, 4 * w) for _, h, w in grids)
    values[f"stages.{stage}.share"] = 4 if stage == "stage1" else 2
    values[f"stages.{stage}.context"] = 2 if stage > "stage2" else 1
  values |= {"train.steps": 10, "checkpoint.every": 1, "checkpoint.keep": 99, "validation.every": 0}
  values |= {key.replace("__", "."): value for key, value in changes.items()}
  with config.ignore_type():
    config.update_from_flattened_dict(values)
  if only:
    with config.unlocked():
      for stage in set(ROWS) - set(only):
        del config.stages[stage]
  return config


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def digests(folder):
  events = [line for line in lines(folder / "events.jsonl") if line["event"] == "checkpoint_saved"]
  return {event["step"]: event["digest"] for event in events}


class Watched:
  """What a training reads: the shapes of its batches, and its clips, by stage."""

  def __init__(self, patch):
    self.shapes, self.clips = [], {}
    place, row = loop.StageRun._place, Loader.row

    def place_and_note(run, batch):
      self.shapes.append((run._stage.name, batch.segment_ids.shape))
      return place(run, batch)

    patch.setattr(loop.StageRun, "_place", place_and_note)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
  """A run through all stages in one go, and what it read; tests may look at it, not go on."""
  folder = epath.Path(tmp_path_factory.mktemp("whole"))
  with pytest.MonkeyPatch.context() as patch:
    watched = Watched(patch)
    assert loop.train(make_config(inputs, validation__every=5), folder) == 0
  return folder, watched


def test_a_run_goes_through_all_stages_by_itself(whole):
  folder, watched = whole
  logged = lines(folder / "metrics.jsonl")
  assert [(line["step"], line["stage"]) for line in logged] == [
    (step, next(name for name, end in ENDS.items() if step <= end)) for step in range(1, 11)
  ]
  assert all(np.isfinite(line["loss"]) for line in logged)
  assert [line["step"] for line in logged if "validation_loss" in line] == [5, 10]
  events = lines(folder / "events.jsonl")
  assert events[0] == {"event": "resumed", "step": 0}
  assert [event for event in events if event["event"] == "stage"] == [
    {"event": "stage", "step": step, "stage": stage}
    for step, stage in ((4, "stage2"), (6, "stage3"), (8, "stage4"))
  ]
  assert set(digests(folder)) >= set(ENDS.values())
  assert set(watched.shapes) == set(ROWS.items())
