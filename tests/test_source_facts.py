"""What the weights of `init_from` were trained for is kept, or changed on purpose."""

import dataclasses
import json
import shutil

import pytest
from drawn import DIT_CONFIG, NOISE, draw
from etils import epath
from model_folder import make_model
from small_run import make_inputs, settings
from typed_config import typed

from cogvideox_jax.conversion import diffusers
from cogvideox_jax.conversion.folder import INDEX
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.training import metrics, resume, source_facts, stages, transformer_run
from configs import base, tiny

LIKE_THE_MODEL = {  # What makes the config that of the drawn model.
  "model.positions": "rope_index",
  "text.drop": "zeros",
  "noise.snr_shift": NOISE.snr_shift,
  "noise.beta_start": NOISE.beta_start,
  "noise.beta_end": NOISE.beta_end,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  folder = make_inputs(epath.Path(tmp_path_factory.mktemp("inputs")), clips=8)
  make_model(folder / "source")
  return folder


def make_config(inputs, *, stages=("tiny",), **changes):
  """The config of a training that begins with the drawn model."""
  config = tiny.get_config()
  with config.unlocked():
    for name, side in zip(stages, (16, 32), strict=False):
      config.stages[name] = base.stage(
        sizes=((side, side),), durations=(1,), row_tokens=48, max_clips=4, rows=8
      )
  values = settings(inputs, init_from=str(inputs / "source"), components=str(inputs / "source"))
  if stages != ("tiny",):
    with config.unlocked():
      del config.stages["tiny"]
    values = {key: x for key, x in values.items() if not key.startswith("stages.")}
  values |= LIKE_THE_MODEL | {key.replace("__", "."): x for key, x in changes.items()}
  return typed(config, **values)


def settle(config, tmp_path):
  return source_facts.settle(config, epath.Path(tmp_path))


def test_equal_facts_pass(inputs, tmp_path, capsys):
  config = make_config(inputs)
  assert settle(config, tmp_path) == config
  assert not capsys.readouterr().out


@pytest.mark.parametrize(
  ("change", "told"),
  [
    ({"model__positions": "rope"}, "config.model.positions: 'rope_index' there, 'rope' here"),
    ({"model__patch": (1, 4, 1)}, "config.model.patch: (1, 2, 2) there, (1, 4, 1) here"),
    ({"noise__snr_shift": 3.0}, "config.noise.snr_shift: 1.0 there, 3.0 here"),
    ({"noise__zero_terminal_snr": False}, "config.noise.zero_terminal_snr: True there, False"),
    ({"text__drop": "empty"}, "config.text.drop: 'zeros' there, 'empty' here"),
  ],
)
def test_a_fact_that_differs_is_refused_kept_or_changed_on_purpose(
  inputs, tmp_path, capsys, change, told
):
  config = make_config(inputs, **change)
  with pytest.raises(UserError) as refused:
    settle(config, tmp_path)
  message = str(refused.value)
  assert told in message and "init.keep=source" in message and "init.keep=config" in message
  assert len(message.splitlines()) <= 4

  kept = settle(make_config(inputs, init__keep="source", **change), tmp_path)
  same = make_config(inputs)
  assert (kept.model, kept.noise, kept.text) == (same.model, same.noise, same.text)
  changed = make_config(inputs, init__keep="config", **change)
  assert settle(changed, tmp_path) == changed
  assert told in capsys.readouterr().out


def test_other_scaled_latents_are_no_question_of_what_to_keep(inputs, tmp_path):
  folder = tmp_path / "other"
  make_model(folder)
  path = folder / "vae" / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0.9}))
  for keep in ("", "source"):
    with pytest.raises(UserError, match=r"scaling factor of the VAE .* there, 0\.9 here"):
      settle(make_config(inputs, components=str(folder), init__keep=keep), tmp_path)


def test_only_what_a_model_folder_states_is_compared(inputs, tmp_path):
  folder = make_model(tmp_path / "published")
  index = json.loads((folder / INDEX).read_text())
  del index["cogvideox_jax"]
  (folder / INDEX).write_text(json.dumps(index))
  for file in (folder / "scheduler").iterdir():
    file.unlink()
  (folder / "scheduler").rmdir()
  change = {"init_from": str(folder), "text__drop": "empty", "noise__snr_shift": 3.0}
  config = make_config(inputs, **change)
  assert settle(config, tmp_path) == config


@pytest.mark.parametrize("growth", ["extrapolate", "interpolate"])
def test_stages_start_from_the_rule_of_the_source(inputs, tmp_path, growth):
  changes = {"stages": ("a", "b"), "train__growth": growth}
  for name, spatial in (("rope", 1.0), ("sincos", 1.875)):
    source = tmp_path / f"{name}_{growth}"
    make_model(source)
    model = dataclasses.replace(DIT_CONFIG, positions=name, spatial_interpolation=spatial)
    diffusers.save_transformer(source / "transformer", *draw(DiT, model))
    theirs = source_facts.read_source(str(source)).model
    assert theirs.positions == name
    changes |= {"init_from": str(source), "model__positions": name}
    with pytest.raises(UserError, match=r"config\.model\."):
      settle(make_config(inputs, **changes), tmp_path)
    kept = settle(make_config(inputs, init__keep="source", **changes), tmp_path)
    first, second = (stages.stage_model(kept, stage) for stage in ("a", "b"))
    for field in ("positions", "spatial_interpolation", "temporal_interpolation"):
      assert getattr(first, field) == getattr(theirs, field)
    grows = growth == "interpolate" and name == "sincos"
    expected = dataclasses.replace(first, spatial_interpolation=spatial * (2 if grows else 1))
    assert second == expected


def test_a_workdir_goes_on_with_the_facts_that_it_was_begun_with(inputs, tmp_path):
  config = make_config(inputs, init__keep="source", noise__snr_shift=3.0)
  begun = settle(config, tmp_path)
  resume.store(epath.Path(tmp_path), begun, {})
  gone = dataclasses.replace(config, init_from="/no/such/model")
  assert settle(gone, tmp_path).noise == begun.noise
  assert settle(config, tmp_path) == begun


def test_whose_facts_to_keep_needs_weights(inputs, tmp_path):
  with pytest.raises(UserError, match="names no weights"):
    settle(make_config(inputs, init_from="", init__keep="source"), tmp_path)


THEIRS = {"model__positions": "rope_index", "noise__snr_shift": NOISE.snr_shift}
OURS = {"model__positions": "rope", "noise__snr_shift": 3.0}


def train(config, workdir, copy_at=None):
  """Trains; returns the digest of each saved step and the loss of each step.

  Args:
    copy_at: a step, and the folder to which the workdir is then copied: what a kill leaves.
  """
  add = metrics.Recorder.add

  def add_and_copy(self, step, values, measure):
    add(self, step, values, measure)
    if copy_at and step == copy_at[0]:
      shutil.copytree(workdir, copy_at[1], ignore=shutil.ignore_patterns("*tmp*"))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(metrics.Recorder, "add", add_and_copy)
    assert transformer_run.train(config, workdir) == 0
  events, logged = (
    [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    for name in ("events.jsonl", "metrics.jsonl")
  )
  saved = {one["step"]: one["digest"] for one in events if one["event"] == "checkpoint_saved"}
  return saved, {line["step"]: line["loss"] for line in logged}


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "held"), [("source", THEIRS), ("config", OURS)])
def test_a_run_that_keeps_facts_ends_as_one_whose_config_has_them_also_if_it_is_killed(
  inputs, tmp_path, keep, held
):
  folder, rest = epath.Path(tmp_path), {"validation__every": 0, "checkpoint__every": 2}
  kept = make_config(inputs, init__keep=keep, **OURS, **rest)
  whole, losses = train(kept, folder / "whole", copy_at=(5, folder / "killed"))
  begun = resume.read_config(folder / "whole")
  assert (begun.model.positions, begun.noise.snr_shift) == tuple(held.values())

  stated, stated_losses = train(
    make_config(inputs, init__keep="config", **held, **rest), folder / "stated"
  )
  assert (stated, stated_losses) == (whole, losses)
  resumed, resumed_losses = train(kept, folder / "killed")
  assert (folder / "killed" / "events.jsonl").read_text().count('"resumed"') == 2
  assert (resumed[6], resumed_losses) == (whole[6], losses)
