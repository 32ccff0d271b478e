"""Ablations of the VAE: which runs there are, that they go on, and what their table says."""

import json
import runpy
import signal
from dataclasses import replace

import jax
import pytest
from drawn import draw
from etils import epath
from in_process import run_here

from cogvideox_jax import interrupts
from cogvideox_jax.config.ablation_schema import VAEAblationConfig
from cogvideox_jax.config.read import read
from cogvideox_jax.conversion import diffusers
from cogvideox_jax.data import digests
from cogvideox_jax.evaluation import vae_table
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.training import checkpoint, vae_ablation, vae_run

CONFIG = """
from ml_collections import ConfigDict
from configs import vae_tiny

def get_config():
  training = vae_tiny.get_config()
  with training.unlocked():
    training.data.update(clips=8, sizes=((16, 16),), durations=(9,), validation_fraction=0.4)
    training.train.update(steps=2, frames=18)
    training.validation.update(every=2, batches=1)
    training.preview.every = 0
  return ConfigDict({
    "training": training,
    "sets": {"shapes": {"path": ""}},
    "variants": {"narrow": variant(2), "wide": variant(4)},
    "seeds": (0, 7),
    "claims": {"channels": {"lower": "narrow", "higher": "wide", "score": "psnr"}},
  })

def variant(channels):
  config = ConfigDict({"model": vae_tiny.model(), "loss": vae_tiny.loss()})
  config.model.update(channels=(8, 8), latent_channels=channels, temporal_compression=2)
  return config
"""


@pytest.fixture
def config_file(tmp_path):
  (tmp_path / "configs").mkdir()
  file = tmp_path / "configs" / "small.py"
  file.write_text(CONFIG)
  return file


@pytest.fixture
def config(config_file):
  return read(VAEAblationConfig, runpy.run_path(str(config_file))["get_config"]())


@pytest.fixture
def evaluate(monkeypatch, capfd, config_file, tmp_path):
  def run(*args):
    flags = (f"--ablation={config_file}", f"--workdir={tmp_path / 'runs'}", "--nofvd", "--json")
    return run_here(monkeypatch, capfd, "evaluate", "vae", "--workers=1", *flags, *args)

  return run


@pytest.fixture
def trained(monkeypatch):
  """The (variant, seed, workdir) of the runs that were begun; they draw a VAE and do not train."""
  begun = []

  def train(config, workdir):
    begun.append((config.model.latent_channels, config.seed, workdir))
    if len(begun) == 3:
      return 83
    _, params = draw(VAE, config.model, seed=config.seed)
    diffusers.save_vae(workdir / "vae", config.model, params)
    finished = workdir / "checkpoints" / str(config.train.steps)
    finished.mkdir(parents=True)
    (finished / digests.NAME).write_text("")
    vae_run.resume.store(workdir, config, {})
    return 0

  monkeypatch.setattr(vae_run, "train", train)
  # Each seed compiles anew what the one before it had compiled.
  monkeypatch.setattr(jax, "clear_caches", lambda: None)
  return begun


def test_an_ablation_goes_on_where_it_stopped_and_sums_up_its_seeds(evaluate, trained, tmp_path):
  runs = epath.Path(tmp_path) / "runs"
  assert evaluate().code == 83
  assert not (runs / "table.md").exists()
  done = evaluate()
  assert done.code == 0
  assert [run[:2] for run in trained] == [(2, 0), (4, 0), (2, 7), (2, 7), (4, 7)]
  assert trained[-1][2] == runs / "shapes" / "wide" / "seed_7"

  rows = [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]
  assert [(row["model"], row["channels"]) for row in rows] == [
    ("shapes/narrow", 2),
    ("shapes/wide", 4),
  ]
  assert all(row["seed"] == [0, 7] and row["lpips"] is None for row in rows)
  assert all(0 < row["clips"] < 8 for row in rows)  # Only files that are held out.
  assert rows[1]["deviations"]["psnr"] > 0
  table = (runs / "table.md").read_text()
  assert f"{rows[1]['psnr']:.2f} ± {rows[1]['deviations']['psnr']:.2f}" in table
  assert "shapes: psnr of narrow < wide: " in table
  assert (runs / "table.png").read_bytes().startswith(b"\x89PNG")

  assert evaluate().code == 0 and len(trained) == 5  # Nothing is trained again.


def test_a_signal_in_the_last_step_of_a_run_ends_the_ablation(
  config, trained, tmp_path, monkeypatch
):
  train = vae_run.train

  def signalled(*args):
    with interrupts.Interrupts():
      signal.raise_signal(signal.SIGTERM)
      return train(*args)

  monkeypatch.setattr(vae_run, "train", signalled)
  assert vae_ablation.train(config, epath.Path(tmp_path) / "runs") == 83
  assert len(trained) == 1


def test_a_lengthened_run_is_trained_and_its_former_vae_removed(config, trained, tmp_path):
  trained.extend([(0, 0, "")] * 3)  # No run is stopped.
  workdir = epath.Path(tmp_path) / "runs"
  for steps in (2, 3, 3):
    training = replace(config.training, train=replace(config.training.train, steps=steps))
    assert vae_ablation.train(replace(config, training=training, seeds=(3,)), workdir) == 0
  assert [run[:2] for run in trained[3:]] == [(2, 3), (4, 3)] * 2
  assert checkpoint.good_steps(workdir / "shapes/wide/seed_3/checkpoints") == [2, 3]


def test_figures_of_seeds_become_means_with_deviations():
  rows = [
    {**dict.fromkeys(vae_table.FIGURES), "psnr": psnr, "seed": seed, "train_seconds": seconds}
    for psnr, seed, seconds in ((20.0, 0, 5.0), (22.0, 1, None))
  ]
  row = vae_table.over_seeds("A", rows)
  assert (row["model"], row["psnr"], row["seed"], row["train_seconds"]) == ("A", 21.0, [0, 1], 5.0)
  assert row["deviations"] == {"psnr": pytest.approx(2**0.5)} and row["lpips"] is None
  assert vae_table.over_seeds("A", rows[:1])["deviations"] == {}


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (["--ablation.claims.channels.lower=narow"], "names 'narow', which is no variant"),
    (["--ablation.claims.channels.score=sharpness"], "must be one of psnr"),
    (["--ablation.training.validation.every=0"], "files that the training holds out"),
    (["--ablation.seeds=(1, 1)"], "each seed may stand there once"),
    (["--ablation.variants.wide.loss.kl=-1.0"], "must be at least 0"),
    (
      ["--ablation.variants.wide.model.temporal_compression=8"],
      "2 levels compress time at most 2 times",
    ),
    (["--model=tiny"], "--model is not taken with --ablation"),
  ],
)
def test_mistakes_are_said_before_anything_is_trained(evaluate, trained, flags, said):
  done = evaluate(*flags)
  assert done.code == 2 and said in done.errors and not trained


def test_models_are_scored_in_no_workdir(monkeypatch, capfd):
  done = run_here(monkeypatch, capfd, "evaluate", "vae", "--model=tiny", "--clips=.", "--workdir=x")
  assert done.code == 2 and "--workdir is not taken without --ablation" in done.errors


@pytest.mark.parametrize("missing", ["--model=tiny", "--clips=."])
def test_a_missing_flag_is_named(monkeypatch, capfd, missing):
  done = run_here(monkeypatch, capfd, "evaluate", "vae", missing)
  assert done.code == 2 and "Missing flag: --" in done.errors


@pytest.mark.slow
def test_an_ablation_is_trained_and_scored(evaluate, tmp_path):
  sizes = {"data.clips": 32, "train.frames": 8 * 9, "train.batch_multiple": 8}  # On eight devices.
  done = evaluate(*(f"--ablation.training.{key}={value}" for key, value in sizes.items()))
  assert done.code == 0, done.errors
  rows = [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]
  assert [row["train_steps"] for row in rows] == [2, 2]
  assert all(0 < row["psnr"] < 40 and row["deviations"]["psnr"] > 0 for row in rows)
