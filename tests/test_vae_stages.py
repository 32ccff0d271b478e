"""The VAE's training in stages, with a discriminator that starts late, from given weights."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from stopped_runs import digests, lines, train_and_stop
from typed_config import typed

from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.conversion import diffusers
from cogvideox_jax.data.decoding import Decoders
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.graphs import abstract
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.models.vae_config import VAEConfig
from cogvideox_jax.training import checkpoint, vae_initial, vae_run, vae_stages
from configs import vae_tiny

SHORT = {
  "sizes": (),
  "durations": (1,),
  "frames": 0,
  "batch_multiple": 0,
  "context": 1,
  "share": 1,
  "learning_rate": 0,
}
LONG = {**SHORT, "sizes": ((8, 8),), "durations": (5,), "frames": 40, "learning_rate": 1e-4}
STAGES = ConfigDict({"1_short": SHORT, "2_long": LONG})


def make_config(**changes):
  config = vae_tiny.get_config()
  config.model.update(channels=(8, 8), temporal_compression=1, latent_channels=4, groups=2)
  config.data.update(clips=16, sizes=((16, 16),), durations=(1, 5), validation_fraction=0.0)
  config.train.update(steps=6, frames=8, batch_multiple=8)
  config.loss.update(adversarial=0.1, gan_start=2)
  config.discriminator.model.update(channels=(8, 8), temporal_levels=1, groups=2)
  config.optimizer.warmup_steps = 0
  config.checkpoint.update(every=1, keep=9)
  config.log_every = 1
  config.preview.every = 0
  config.validation.every = 0
  config.mesh.update(data=8, fsdp=1)
  return typed(config, VAETrainConfig, **changes)


@pytest.mark.slow
def test_a_run_stopped_before_and_after_the_discriminator_starts_and_stages_change_keeps_its_bits(
  tmp_path,
):
  config = make_config(stages=STAGES)
  whole, stopped = epath.Path(tmp_path / "whole"), epath.Path(tmp_path / "stopped")
  assert vae_run.train(config, whole) == 0
  for step in (1, 2, 3, 5):
    train_and_stop(vae_run.train, config, stopped, at=step)
  assert vae_run.train(config, stopped) == 0
  assert digests(stopped) == digests(whole)
  logged = lines(whole / "metrics.jsonl")
  assert [line["stage"] for line in logged] == ["1_short"] * 3 + ["2_long"] * 3
  assert ["generator" in line for line in logged] == [False] * 2 + [True] * 4
  assert [line["frames"] for line in logged] == [8] * 3 + [40] * 3
  saved = {step: checkpoint.load_weights(whole, "raw") for step in (6,)}[6]
  assert saved.keys() == {"vae", "discriminator"}
  kept = json.loads((whole / "checkpoints" / "6" / "digests.json").read_text())["arrays"]
  assert {name.split("/")[1] for name in kept if name.startswith("opt_state/")} == saved.keys()


def test_a_start_past_the_last_step_is_warned_of(tmp_path, capsys):
  config = make_config(loss__gan_start=6)
  with Decoders(1) as decoders:
    vae_run.Run(config, epath.Path(tmp_path), decoders, {})
  assert "gan_start is 6, but the training ends at step 6" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("steps", "given", "start"), [(1000, 300, 300), (1000, 0.25, 250), (15, 1 / 15, 1), (10, 0, 0)]
)
def test_the_discriminator_starts_at_a_step_or_a_fraction_of_them(steps, given, start):
  config = make_config(train__steps=steps, loss__gan_start=given)
  assert vae_stages.gan_start(config) == start


def test_a_stage_takes_what_it_leaves_open_from_the_config():
  config = make_config(stages=STAGES, train__steps=9)
  short, long = vae_stages.plan(config)
  assert (short.stage.start, short.stage.end, long.stage.end) == (0, 5, 9)
  assert (short.config.sizes, short.config.durations, short.config.frames) == (((16, 16),), (1,), 8)
  assert (long.config.sizes, long.config.durations, long.config.frames) == (((8, 8),), (5,), 40)
  assert float(vae_stages.learning_rate(config, long)(5)) == pytest.approx(1e-4)
  (only,) = vae_stages.plan(make_config())
  assert only.config.durations == (1, 5)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (
      {"stages": ConfigDict({"a": SHORT, "b": {**SHORT, "durations": (6,)}})},
      r"stages\.b.*\b5 or 9",
    ),
    ({"data__more_fps": (16.0, 8.0)}, r"more_fps has 8, which is not above"),
    ({"stages": STAGES, "train__steps": 1}, "at least 2 steps"),
    ({"model__groups": 3}, r"groups is 3, which does not divide"),
    ({"model__temporal_compression": 3}, r"must be a power of 2"),
    ({"model__temporal_compression": 16}, r"levels compress time at most"),
    ({"loss__adversarial": -0.1}, r"loss\.adversarial is -0\.1"),
    ({"data__image_share": 1.0}, r"image_share is 1\.0"),
  ],
)
def test_a_config_that_cannot_work_is_refused_before_any_work(tmp_path, changes, words):
  with pytest.raises(UserError, match=f"(?s){words}"):
    vae_run.train(make_config(**changes), epath.Path(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_training_may_begin_with_a_vae_of_any_place(tmp_path):
  config = VAEConfig(channels=(8, 8), latent_channels=4, resnets=1, groups=2)
  shapes = abstract(VAE, config)[1]
  drawn = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape), shapes)
  params = jax.tree.map(np.float32, drawn)
  diffusers.save_vae(tmp_path / "model" / "vae", config, params)
  for source in (tmp_path / "model", tmp_path / "model" / "vae"):
    found = vae_initial.load_vae(str(source), config, shapes)
    jax.tree.map(np.testing.assert_array_equal, found, params)
  with pytest.raises(UserError, match=r"another VAE than config\.model: .* there and \(8,\) here"):
    vae_initial.load_vae("tiny", config, shapes)
  with pytest.raises(UserError, match="no model at"):
    vae_initial.load_vae(str(tmp_path / "nothing"), config, shapes)
