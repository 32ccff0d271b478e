"""Progressive training: what each stage takes of a run, and that a run goes through all of them."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from model_folder import make_model
from small_run import settings, write_dataset
from typed_config import typed

from cogvideox_jax.config.schema import SourceConfig
from cogvideox_jax.conversion import orbax, tensors
from cogvideox_jax.data.loader import Loader
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import (
  dataset_report,
  meshes,
  metrics,
  stage_data,
  stages,
  state,
  step_functions,
  transformer_run,
  workdir,
)
from configs import tiny_stages

GRIDS = {  # Latent frames, height, width.
  "stage1": ((1, 2, 2), (3, 2, 2)),
  "stage2": ((1, 4, 4), (3, 4, 2)),
  "stage3": ((3, 8, 4), (3, 4, 8)),
}
CLIPS = 40
ROWS = {"stage1": (16, 32), "stage2": (8, 40), "stage3": (8, 64), "stage4": (8, 64)}
ENDS = {"stage1": 2, "stage2": 4, "stage3": 6, "stage4": 8}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  """FOLDER/data, a dataset of each stage but the last, and FOLDER/model, of drawn weights."""
  folder = epath.Path(tmp_path_factory.mktemp("inputs"))
  for seed, (stage, grids) in enumerate(GRIDS.items()):
    scores = np.random.default_rng(seed).permutation(CLIPS)
    write_dataset(folder / "data" / stage, seed, CLIPS, grids, scores)
  make_model(folder / "model")
  return folder


GROWS = {"train__growth": "interpolate", "model__positions": "rope"}


def make_config(inputs, only=(), **changes):
  """Small stages of two updates each, of which the last two have another mesh; or `only` some."""
  config = tiny_stages.get_config()
  values = {k: v for k, v in settings(inputs).items() if not k.startswith("stages.")}
  for stage, (rows, tokens) in ROWS.items():
    values |= {f"stages.{stage}.rows": rows, f"stages.{stage}.row_tokens": tokens}
    grids = GRIDS[config.stages[stage].data or stage]
    values[f"stages.{stage}.sizes"] = tuple((4 * h, 4 * w) for _, h, w in grids)
    values[f"stages.{stage}.share"] = 1
    values[f"stages.{stage}.context"] = 2 if stage > "stage2" else 1
  values |= {"train.steps": 8, "checkpoint.every": 1, "checkpoint.keep": 99, "validation.every": 0}
  values |= {key.replace("__", "."): value for key, value in changes.items()}
  if only:
    with config.unlocked():
      for stage in set(ROWS) - set(only):
        del config.stages[stage]
        values = {k: v for k, v in values.items() if not k.startswith(f"stages.{stage}.")}
  return typed(config, **values)


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def digests(folder):
  events = [line for line in lines(folder / "events.jsonl") if line["event"] == "checkpoint_saved"]
  return {event["step"]: event["digest"] for event in events}


class Watched:
  """Notes what a training reads: the shape of each batch, and the clips of each row, by stage."""

  def __init__(self, patch):
    self.shapes, self.clips = [], {stage: {} for stage in ROWS}
    assemble, iterate, loaders = transformer_run.StageRun._assemble, Loader.iterate, []

    def assemble_and_note(run, batch):
      self.shapes.append((run._stage.name, batch.segment_ids.shape))
      return assemble(run, batch)

    def iterate_and_note(loader, start=0):
      loaders.append(loader)  # Each stage makes one that is iterated.
      clips = self.clips[list(ROWS)[len(loaders) - 1]]
      for k, batch in enumerate(iterate(loader, start), start):
        clips |= {row: loader.row(row).row.clips.tolist() for row in loader.rows_of(k)}
        yield batch

    patch.setattr(transformer_run.StageRun, "_assemble", assemble_and_note)
    patch.setattr(Loader, "iterate", iterate_and_note)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
  """A run through all stages in one go, and what it read; tests may look at it, not go on."""
  folder = epath.Path(tmp_path_factory.mktemp("whole"))
  with pytest.MonkeyPatch.context() as patch:
    watched = Watched(patch)
    assert transformer_run.train(make_config(inputs, **GROWS), folder) == 0
  return folder, watched


def test_a_run_goes_through_all_stages_by_itself(whole):
  folder, watched = whole
  logged = lines(folder / "metrics.jsonl")
  assert [(line["step"], line["stage"]) for line in logged] == [
    (step, next(name for name, end in ENDS.items() if step <= end)) for step in range(1, 9)
  ]
  assert all(np.isfinite(line["loss"]) for line in logged)
  events = lines(folder / "events.jsonl")
  assert events[0] == {"event": "resumed", "step": 0}
  assert [event for event in events if event["event"] == "stage"] == [
    {"event": "stage", "step": step, "stage": stage}
    for step, stage in ((2, "stage2"), (4, "stage3"), (6, "stage4"))
  ]
  assert set(digests(folder)) >= set(ENDS.values())
  assert list(dict.fromkeys(watched.shapes)) == list(ROWS.items())


def test_each_stage_reads_its_own_rows_from_the_first_and_the_last_one_the_best_clips(
  inputs, whole
):
  config = make_config(inputs)
  for stage, seen in whole[1].clips.items():
    dataset = Dataset(inputs / "data" / (config.stages[stage].data or stage))
    rows = dataset_report.training_rows(config, stage, dataset)
    taken = range(2 * ROWS[stage][0])
    listed = dataset_report.list_rows(config, stage, rows, taken, hosts=1)
    told = [[dataset.source(clip) for clip in seen[row]] for row in taken]
    assert told == [row["clips"] for row in listed]

  index = dataset.index
  train = index.source_hash >= config.data.validation_fraction * 2.0**64
  threshold = np.sort(index.score[train])[-round(0.2 * train.sum())]
  best = np.flatnonzero(train & (index.score >= threshold)).tolist()
  assert sorted({clip for clips in seen.values() for clip in clips}) == best
  assert 0 < len(best) < CLIPS / 4


def stop_after(config, folder, step):
  """Trains until a signal comes after a step, which a run that is over then does not heed."""
  add = metrics.Recorder.add

  def add_and_signal(self, number, values, measure):
    add(self, number, values, measure)
    if number == step:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(metrics.Recorder, "add", add_and_signal)
    return transformer_run.train(config, folder)


@pytest.mark.slow
def test_a_run_stopped_in_every_stage_and_at_every_boundary_ends_with_the_same_bits(
  inputs, whole, tmp_path
):
  config, folder = make_config(inputs, **GROWS), epath.Path(tmp_path)
  for step in range(1, 9):
    assert stop_after(config, folder, step) == (83 if step < 8 else 0)
  assert digests(folder) == {**digests(folder), **digests(whole[0])}
  resumed = [line["step"] for line in lines(folder / "events.jsonl") if line["event"] == "resumed"]
  assert resumed == list(range(8))


@pytest.mark.slow
def test_a_stage_falls_back_on_a_checkpoint_of_an_earlier_one(inputs, whole, tmp_path):
  folder = epath.Path(tmp_path) / "run"
  shutil.copytree(whole[0], folder)
  for step in (5, 6, 7, 8):  # The newest was made on another mesh than the one before it.
    (folder / "checkpoints" / str(step) / "digests.json").write_text("{}")
  assert stop_after(make_config(inputs, **GROWS), folder, 5) == 83
  again = [line for line in lines(folder / "events.jsonl") if line["event"] == "checkpoint_saved"]
  assert again[-1] == {"event": "checkpoint_saved", "step": 5, "digest": digests(whole[0])[5]}


@pytest.fixture(scope="module")
def two(inputs, tmp_path_factory):
  """A run of two stages that starts the moments anew."""
  folder = epath.Path(tmp_path_factory.mktemp("two"))
  config = make_config(
    inputs, ("stage1", "stage2"), train__steps=4, validation__every=2,
    train__carry_optimizer=False, **GROWS,
  )  # fmt: skip
  assert stop_after(config, folder, 2) == 83
  assert transformer_run.train(config, folder) == 0
  return folder


def test_what_is_sampled_and_converted_has_the_positions_of_its_stage(whole, tmp_path):
  runs = [epath.Path(tmp_path) / str(step) for step in (2, 4)]
  for folder in runs:  # As if stopped at that step.
    shutil.copytree(whole[0], folder)
    for step in range(int(folder.name) + 1, 9):
      shutil.rmtree(folder / "checkpoints" / str(step))
  scales = [workdir.open_trained(folder, "raw").networks["transformer"].config for folder in runs]
  assert [one.positions for one in scales] == ["rope_scaled", "rope_scaled"]
  assert [one.spatial_interpolation for one in scales] == [1.0, 2.0]
  video = workdir.load(runs[1])(
    "a clip", num_frames=1, height=16, width=16, num_inference_steps=1, output_type="uint8"
  )
  assert video.frames[0].shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_each_stage_is_validated_on_its_own_held_out_clips(two):
  measured = [line for line in lines(two / "metrics.jsonl") if "validation_loss" in line]
  assert [(line["step"], line["stage"]) for line in measured] == [(2, "stage1"), (4, "stage2")]
  assert all(np.isfinite(line["validation_loss"]) for line in measured)


def counts(folder, step):
  """How many updates the moments of a checkpoint have had, and what the schedule counts."""
  stored = orbax.open_arrays(folder / "checkpoints" / str(step))
  found = {name: x for name, x in stored.items() if name.endswith("count")}
  return {int(count) for count in tensors.materialize(found).values()}


def test_moments_go_on_where_a_stage_begins(whole):
  assert [counts(whole[0], step) for step in (2, 3, 7, 8)] == [{2}, {3}, {7}, {8}]


@pytest.mark.slow
def test_moments_begin_anew_where_a_stage_begins(two):
  assert [counts(two, step) for step in (1, 2, 3, 4)] == [{1}, {2}, {1}, {2}]


def test_a_stage_that_begins_has_no_moments_but_the_weights_and_their_average(inputs):
  config = make_config(inputs, train__carry_optimizer=False)
  _, two, three, _ = stages.plan(config)
  before, after = (
    step_functions.make_functions(
      config, stage.name, *meshes.make_mesh(config, stage.name)
    ).abstract
    for stage in (two, three)
  )
  ones = jax.tree.map(lambda x: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding), before)
  ends = ones._replace(step=jnp.int32(three.start))
  begun = stages.enter(config, three, ends, after)
  assert state.shardings_of(begun) == state.shardings_of(after) != state.shardings_of(before)
  assert {float(jnp.max(x)) for x in jax.tree.leaves(begun.opt_state)} == {0.0}
  for part in (begun.params, begun.ema):
    assert {float(jnp.min(x)) for x in jax.tree.leaves(part)} == {1.0}
  inside = stages.enter(config, two, ones, before)
  assert {float(jnp.min(x)) for x in jax.tree.leaves(inside.opt_state)} == {1.0}


def test_the_logged_rate_is_the_one_that_moved_the_weights(inputs):
  kernel = {"kernel": jnp.ones(3)}
  for carry in (True, False):
    config = make_config(inputs, train__carry_optimizer=carry, train__steps=16)
    stage = stages.plan(config)[1]  # Updates 4 to 8.
    tx = stages.make_optimizer(config, stage.name)
    opt_state = tx.init(kernel)
    for _ in range(2 + (stage.start if carry else 0)):
      updates, opt_state = tx.update({"kernel": jnp.zeros(3)}, opt_state, kernel)
    rate = stages.learning_rate(config, stage.name)(stage.start + 1)  # The rate of the last update.
    assert 0 < float(rate) < config.optimizer.learning_rate
    np.testing.assert_allclose(
      updates["kernel"], -config.optimizer.weight_decay * rate * jnp.ones(3), rtol=1e-6
    )


def test_clips_of_the_embedded_data_are_made_once_and_scored(inputs, tmp_path):
  buckets = {}
  for stage, size in (("stage1", 16), ("stage2", 24), ("stage3", 32), ("stage4", 32)):
    buckets |= {f"stages__{stage}__sizes": ((size, size),), f"stages__{stage}__durations": (9,)}
  config = make_config(
    inputs, data__path="", data__clips=20, components=str(inputs / "model"),
    model__text_length=20, stages__stage4__row_tokens=100, **buckets,
  )  # fmt: skip
  folder = epath.Path(tmp_path)
  stage_data.make_data(config, folder)
  encoded = folder / "data" / "encoded"
  assert {path.name for path in encoded.iterdir() if path.is_dir()} == set(GRIDS)
  assert (encoded / "quarantine.jsonl").read_text() == ""
  names = {stage: [*stage_data.open_data(config, stage, folder)] for stage in ROWS}
  assert list(names.values()) == [["stage1"], ["stage2"], ["stage3"], ["stage3"]]
  rows = dataset_report.training_rows(config, "stage4", Dataset(encoded / "stage3"))
  score, kept = rows.dataset.index.score, rows.clips
  assert len(kept) in (3, 4) and np.isfinite(score).all()
  assert score[kept].min() > np.median(score)


def test_a_mixture_has_a_dataset_of_each_stage_for_each_name(inputs, tmp_path):
  sources = {
    name: SourceConfig(str(inputs / "data"), float(n)) for n, name in enumerate(("one", "other"), 1)
  }
  config = make_config(inputs, data__path="")
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=sources))
  digests = {}
  for stage in ROWS:
    opened = stage_data.open_data(config, stage, epath.Path(tmp_path))
    source = config.stages[stage].data or stage
    assert [data.directory for data in opened.values()] == 2 * [inputs / "data" / source]
    assert stage_data.weights(config, stage) == {"one": 1.0, "other": 2.0}
    digests |= stage_data.data_digests(config, stage, opened)
  assert sorted(digests) == sorted(
    f"{name}/{stage}" for name in ("one", "other") for stage in GRIDS
  )
  sources["one"] = SourceConfig(str(inputs / "data" / "stage1"), 1.0)
  with pytest.raises(UserError, match="the dataset of one stage, but the config has 4"):
    stage_data.open_data(config, "stage2", epath.Path(tmp_path))
