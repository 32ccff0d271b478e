"""The loop around the step: what a run leaves behind, goes on from, and refuses."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from small_run import make_config, make_inputs, settings
from stopped_runs import train_and_stop
from typed_config import typed

from cogvideox_jax.data.loader import Loader
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.diffusion import timesteps
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import (
  checkpoint,
  drive,
  initial_weights,
  meshes,
  metrics,
  stage_data,
  step_functions,
  transformer_run,
)
from configs import base, tiny

LOGGED = {
  "step",
  "loss",
  "grad_norm",
  "learning_rate",
  "step_seconds",
  "tokens_per_second",
  "padding_fraction",
  "epoch",
}


@pytest.fixture(scope="module")
def inputs(finished_run):
  return finished_run.inputs


@pytest.fixture(scope="module")
def finished(finished_run):
  return finished_run.workdir


@pytest.fixture
def copied(finished, tmp_path):
  """A finished run that a test may go on with."""
  return epath.Path(shutil.copytree(finished, tmp_path / "copied"))


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_is_logged_and_the_last_is_saved(finished):
  logged = lines(finished / "metrics.jsonl")
  assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
  assert all(line.keys() >= LOGGED for line in logged)
  assert all(0 <= line["padding_fraction"] < 0.5 for line in logged)
  peak = tiny.get_config().optimizer.learning_rate
  assert [line["learning_rate"] for line in logged[:3]] == pytest.approx(
    [peak / 3, peak / 1.5, peak]
  )
  events = lines(finished / "events.jsonl")
  assert events[0] == {"event": "resumed", "step": 0}
  assert [event["step"] for event in events[1:]] == [2, 4, 6]
  assert len({event["digest"] for event in events[1:]}) == 3
  assert checkpoint.good_steps(finished / "checkpoints") == [2, 4, 6]
  assert list((finished / "tensorboard").iterdir())


def test_validation_is_on_held_out_clips_at_fixed_timesteps(finished):
  measured = [line for line in lines(finished / "metrics.jsonl") if "validation_loss" in line]
  assert [line["step"] for line in measured] == [3, 6]
  for line in measured:
    each = [line[f"validation_loss_{t}"] for t in (100, 300, 500, 700, 900)]
    assert line["validation_loss"] == pytest.approx(np.mean(each))


def test_a_run_can_begin_with_the_average_of_another(inputs, finished):
  config = make_config(inputs, init_from=str(finished))
  functions = step_functions.make_functions(config, "tiny", *meshes.make_mesh(config, "tiny"))
  state = functions.create(jax.random.key(5))
  average = checkpoint.load_weights(finished, "ema")
  jax.tree.map(np.testing.assert_array_equal, state.params, average)
  jax.tree.map(np.testing.assert_array_equal, state.ema, average)
  assert int(state.step) == 0
  deeper = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape[1:]), x.dtype), average)
  with pytest.raises(UserError, match=r"is \(2, .*\) there and \(3, .*\) here"):
    initial_weights.load_initial(str(finished), deeper)


@pytest.mark.parametrize(("chosen", "name"), [(True, "explicit_uniform"), (False, "uniform")])
def test_the_config_chooses_how_timesteps_are_drawn(inputs, monkeypatch, chosen, name):
  config = make_config(inputs, train__explicit_uniform=chosen)
  mesh, rules = meshes.make_mesh(config, "tiny")
  functions = step_functions.make_functions(config, "tiny", mesh, rules)
  asked = []
  for draw in (timesteps.explicit_uniform, timesteps.uniform):

    def spy(*arguments, draw=draw):
      asked.append(draw.__name__)
      return draw(*arguments)

    monkeypatch.setattr(timesteps, draw.__name__, spy)
  batch = meshes.abstract_batch(config, "tiny", mesh, rules)
  jax.eval_shape(functions.train, functions.abstract, batch, jax.eval_shape(jax.random.key, 0))
  assert asked == [name]


def test_a_signal_saves_and_the_same_call_goes_on_to_the_same_end(
  inputs, finished, tmp_path, capsys
):
  workdir = epath.Path(tmp_path)
  train_and_stop(transformer_run.train, make_config(inputs), workdir, at=3)
  assert "Stopped at step 3, which is saved." in capsys.readouterr().out
  assert checkpoint.good_steps(workdir / "checkpoints") == [2, 3]
  # What is looked at may change, what is trained may not.
  assert transformer_run.train(make_config(inputs, checkpoint__every=5, log_every=2), workdir) == 0
  assert "resumed at step 3 of 6" in capsys.readouterr().out
  assert {"event": "resumed", "step": 3} in lines(workdir / "events.jsonl")
  ends = [lines(folder / "events.jsonl")[-1] for folder in (workdir, finished)]
  assert ends[0]["digest"] == ends[1]["digest"]


def test_what_is_computed_again_may_change(inputs, copied):
  assert transformer_run.train(make_config(inputs, remat="full"), copied) == 0


def test_a_finished_run_is_left_as_it_is(inputs, copied):
  digests = (copied / "checkpoints" / "6" / "digests.json").read_text()
  assert transformer_run.train(make_config(inputs), copied) == 0
  assert (copied / "checkpoints" / "6" / "digests.json").read_text() == digests
  assert lines(copied / "events.jsonl")[-1] == {"event": "resumed", "step": 6}


@pytest.mark.parametrize(
  "change, message",
  [
    ({"train__steps": 5}, r"config.train.steps: was 6, is 5\n.*--config.init_from="),
    (
      {"seed": 1, "text__drop_rate": 0.5},
      r"config.seed: was 0, is 1\n.*drop_rate: was 0.1, is 0.5",
    ),
  ],
)
def test_another_config_in_the_same_workdir_is_refused(inputs, copied, change, message):
  with pytest.raises(UserError, match=message):
    transformer_run.train(make_config(inputs, **change), copied)


def test_data_may_move_but_not_change(inputs, copied, tmp_path):
  shutil.copytree(inputs / "data", tmp_path / "moved")
  assert transformer_run.train(make_config(inputs, data__path=str(tmp_path / "moved")), copied) == 0
  other = make_inputs(epath.Path(tmp_path) / "other", seed=1)
  with pytest.raises(UserError, match="the records of 'tiny' are not the same"):
    transformer_run.train(make_config(inputs, data__path=str(other / "data")), copied)


def mix(first, second, weights):
  """The config of a run on two datasets of these weights."""
  config = tiny.get_config()
  with config.unlocked():
    for name, inputs, weight in zip(("first", "second"), (first, second), weights, strict=True):
      config.data.mixture[name] = base.source(str(inputs / "data"), weight)
  return typed(config, **settings(first, data__path=""))


def test_datasets_of_a_mixture_have_an_order_and_dropped_captions_of_their_own(inputs):
  config = mix(inputs, inputs, (1, 1))
  dataset = Dataset(inputs / "data" / "tiny")
  same = {"first": dataset, "second": dataset}
  one, other = stage_data.make_rows(config, "tiny", same, "train", "zeros").values()
  alone = stage_data.make_rows(config, "tiny", {"first": dataset}, "train", "zeros")["first"]
  plans = [rows._epoch_plan(0) for rows in (one, other, alone)]
  assert (plans[0].dropped != plans[1].dropped).any()
  assert (plans[0].rows.clips != plans[1].rows.clips).any()
  # A dataset keeps them when others come or go.
  np.testing.assert_array_equal(plans[0].rows.clips, plans[2].rows.clips)


def test_weights_may_change_when_a_run_goes_on_and_no_row_is_lost_or_repeated(
  inputs, tmp_path, monkeypatch
):
  second = make_inputs(epath.Path(tmp_path) / "second", seed=1)
  workdir, placed, iterate = epath.Path(tmp_path) / "run", {}, Loader.iterate

  def iterate_and_note(self, start=0):
    for k, batch in enumerate(iterate(self, start), start):
      placed.update((index, self.row(index)) for index in self.rows_of(k))
      yield batch

  monkeypatch.setattr(Loader, "iterate", iterate_and_note)
  train_and_stop(transformer_run.train, mix(inputs, second, (1, 1)), workdir, at=1)
  config, kept = mix(inputs, second, (3, 1)), workdir / "mixture.json"
  before = kept.read_text()
  kept.write_text('{"tiny": [{}]}')
  with pytest.raises(UserError, match=r"mixture\.json is damaged"):
    transformer_run.train(config, workdir)
  kept.write_text(before)
  assert transformer_run.train(config, workdir) == 0

  rows = [placed[index] for index in range(6 * 8)]
  assert [dataset for dataset, _ in rows].count("first") == 4 + 30
  datasets = stage_data.make_rows(
    config, "tiny", stage_data.open_data(config, "tiny", workdir), "train", "zeros"
  )
  for name, planned in datasets.items():
    mine = [row.clips.tolist() for dataset, row in rows if dataset == name]
    assert mine == [planned[number].clips.tolist() for number in range(len(mine))]
  history = json.loads(kept.read_text())
  assert history == {
    "tiny": [
      {"start": 0, "weights": {"first": 1, "second": 1}, "offsets": {}},
      {"start": 8, "weights": {"first": 3, "second": 1}, "offsets": {"first": 4, "second": 4}},
    ]
  }


def test_nothing_of_a_step_is_waited_for_or_read_until_two_later(inputs, tmp_path, monkeypatch):
  """As on an accelerator, where the loop must run ahead of the device."""
  begun, read, lags = itertools.count(1), metrics.Recorder._read, []
  latest, wait = 0, jax.block_until_ready

  def compile_and_count(self, *args):
    programs = compile_programs(self, *args)

    def train(*args):
      nonlocal latest
      latest = next(begun)
      return wait(programs.train(*args))  # Fake devices need the wait, and only here.

    return programs._replace(train=train)

  def read_and_note(self, step, *args):
    lags.append(latest - step)
    read(self, step, *args)

  def refuse(tree):
    raise AssertionError("the loop waits for a step")

  compile_programs = transformer_run.StageRun._compile
  monkeypatch.setattr(transformer_run.StageRun, "_compile", compile_and_count)
  monkeypatch.setattr(metrics.Recorder, "_read", read_and_note)
  take_steps = drive.take_steps

  def run_ahead(state, batches, take_step, session, *args, **named):
    return take_steps(state, batches, take_step, session._replace(waits=False), *args, **named)

  monkeypatch.setattr(drive, "take_steps", run_ahead)
  monkeypatch.setattr(jax, "block_until_ready", refuse)
  config = make_config(inputs, train__steps=6, checkpoint__every=0, validation__every=0)
  assert transformer_run.train(config, epath.Path(tmp_path)) == 0
  assert lags == [2, 2, 2, 2, 1, 0]  # The last are read before they are saved.


@pytest.mark.parametrize(
  "change, message",
  [
    ({"mesh__data": 3}, "8 devices"),
    ({"stages__tiny__rows": 12}, "multiple of 8"),
    ({"sharding": "none"}, "config.sharding"),
    ({"components": "/no/such/model"}, "no model at /no/such/model"),
    ({"data__path": "/no/such/data"}, "not an encoded dataset"),
    (
      {"model__in_channels": 16, "model__out_channels": 16},
      "latent channels 4, but config.model says 16",
    ),
    ({"optimizer__warmup_steps": 6}, "warm-up must be shorter"),
    ({"init_from": "/no/such/run"}, "no model at /no/such/run"),
  ],
)
def test_what_cannot_work_is_said_before_any_step(inputs, tmp_path, change, message):
  with pytest.raises(UserError, match=message):
    transformer_run.train(make_config(inputs, **change), epath.Path(tmp_path))


def test_a_workdir_that_is_a_file_is_named(inputs, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="file"):
    transformer_run.train(make_config(inputs), epath.Path(tmp_path) / "file")


@pytest.mark.slow
def test_without_a_guard_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(
  inputs, tmp_path, monkeypatch
):
  assemble, number = transformer_run.StageRun._assemble, itertools.count(1)

  def assemble_and_spoil(self, batch):
    spoils = next(number) == 4
    nothing = np.full_like(batch.mean, np.nan)
    return assemble(self, batch._replace(mean=nothing) if spoils else batch)

  monkeypatch.setattr(transformer_run.StageRun, "_assemble", assemble_and_spoil)
  workdir = epath.Path(tmp_path)
  with pytest.raises(UserError, match=r"at step 4: .*loss not finite. Earlier .* intact"):
    transformer_run.train(make_config(inputs, validation__every=0, guard__in_a_row=0), workdir)
  assert checkpoint.good_steps(workdir / "checkpoints") == [2]
  (stop,) = [e for e in lines(workdir / "events.jsonl") if e["event"] == "not_finite"]
  clips = stop.pop("clips")
  assert stop == {"event": "not_finite", "step": 4, "metrics": ["grad_norm", "loss"]}
  assert clips and set(clips) <= {f"{number}.mp4" for number in range(48)}


class TwoDatasets(Loader):
  """What a line of the log asks of a loader."""

  def __init__(self):
    pass

  def padding_fraction(self, k):
    return 0.25

  def epochs(self, k):
    return {"images": k // 2, "videos": 0}


def test_the_log_counts_real_tokens_and_the_epochs_of_each_dataset():
  assert transformer_run.describe_batch(TwoDatasets(), 5, tokens=100, seconds=4.5) == {
    "tokens_per_second": 75 / 4.5,
    "padding_fraction": 0.25,
    "epoch": 2,
    "epoch_images": 2,
    "epoch_videos": 0,
  }
