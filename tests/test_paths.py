"""Paths are absolute from where they enter: commands work from any folder, with any path."""

import dataclasses
import os
from pathlib import Path

import jax.numpy as jnp
import pytest
from etils import epath
from in_process import run_here
from typed_config import typed

from cogvideox_jax import paths
from cogvideox_jax.config.locations import with_absolute_paths
from cogvideox_jax.config.read import read
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.conversion import model_layouts, tensors
from cogvideox_jax.errors import UserError
from cogvideox_jax.precompute import encode_clips
from cogvideox_jax.training import (
  checkpoint,
  dataset_report,
  resume,
  transformer_run,
  vae_run,
  workdir,
)
from cogvideox_jax.training.state import NOTHING, TrainState
from configs import base, tiny, vae_tiny

CONFIGS = Path(__file__).parent.parent / "configs"
TINY, VAE = f"--config={CONFIGS / 'tiny.py'}", f"--config={CONFIGS / 'vae_tiny.py'}"


class SeenError(Exception):
  """Ends a command where the real work would begin."""


@pytest.fixture
def here(tmp_path, monkeypatch):
  """A folder to run in, with a link to another folder beside it; the home folder is known."""
  for name in ("here", "away/deep", "home"):
    (tmp_path / name).mkdir(parents=True)
  (tmp_path / "here" / "link").symlink_to(tmp_path / "away" / "deep")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.chdir(tmp_path / "here")
  return tmp_path / "here"


# What is given, from `here`, and what it means, from the folder above.
GIVEN = {
  "x": "here/x",
  "./x/": "here/x",
  "../x": "x",
  "a/../x": "here/x",
  "link/x": "here/link/x",
  "link/../x": "away/x",
  "~/x": "home/x",
  "~": "home",
  "two words/x": "here/two words/x",
  "Café 🎈": "here/Café 🎈",
  "a:b?c#d%20": "here/a:b?c#d%20",
}


@pytest.mark.parametrize("given", GIVEN)
def test_a_path_means_what_the_system_means_by_it(here, given):
  assert paths.absolute(given) == str(here.parent / GIVEN[given])


def test_absolute_paths_and_addresses_stay(here):
  for path in ("/a/b", "gs://bucket/../a", "https://host/a"):
    assert paths.absolute(path) == path
  assert paths.absolute("//a//b/./c") == "/a/b/c"
  assert paths.absolute("/a/b/../c") == "/a/c"


@pytest.mark.parametrize(("given", "word"), [("", "empty"), ("~nobody_of_that_name/x", "no user")])
def test_what_is_no_path_is_explained(here, given, word):
  with pytest.raises(UserError, match=word):
    paths.absolute(given)


def test_a_deleted_current_folder_is_explained(here):
  os.rmdir(here / "../away/deep")
  os.chdir(here.parent / "away")
  os.rmdir(here.parent / "away")
  with pytest.raises(UserError, match="deleted"):
    paths.absolute("x")
  assert paths.absolute("/x") == "/x"
  os.chdir(here)


def test_the_paths_of_a_config_are_absolute_and_its_names_stay(here):
  config = tiny.get_config()
  with config.unlocked():
    config.data.mixture.one = base.source("../one", 1.0)
  config.preview.images = ("~/a.png", "b.png")
  config.init_from = "../runs/old"
  found = with_absolute_paths(typed(config))
  assert found.components == "tiny"
  assert found.data.path == ""
  assert found.data.mixture["one"].path == str(here.parent / "one")
  assert found.preview.images == (str(here.parent / "home/a.png"), str(here / "b.png"))
  assert found.init_from == str(here.parent / "runs/old")
  vae = vae_tiny.get_config()
  vae.data.path = "clips"
  found = with_absolute_paths(read(VAETrainConfig, vae))
  assert found.data.path == str(here / "clips")


@pytest.mark.parametrize("given", ["../out", "~/out", "two words/Café", "link/../out"])
@pytest.mark.parametrize(
  ("verb", "args", "module", "function"),
  [
    ("train", (TINY, "--workdir={}"), transformer_run, "train"),
    ("train_vae", (VAE, "--workdir={}"), vae_run, "train"),
    ("demo", (TINY, "--workdir={}"), transformer_run, "train"),
    ("encode", (TINY, "--input={}", "--output={}", "--model={}"), encode_clips, "encode"),
    ("sample", ("--prompt=a", "--output={}.mp4", "--model={}"), workdir, "describe"),
    ("convert", ("--source={}", "--target=x", "--format=sat"), model_layouts, "read_folder"),
    ("convert", ("--source=tiny", "--target={}", "--format=orbax"), model_layouts, "write"),
    ("inspect", ("{}",), dataset_report, "open_stages"),
  ],
)
def test_every_command_hands_on_absolute_paths(
  here, monkeypatch, capfd, given, verb, args, module, function
):
  seen = []

  def record(*values, **_):
    seen.extend(os.fspath(value) for value in values if isinstance(value, str | os.PathLike))
    raise SeenError

  monkeypatch.setattr(module, function, record)
  wanted = paths.absolute(given)
  Path(wanted).mkdir(parents=True, exist_ok=True)
  with pytest.raises(SeenError):
    run_here(monkeypatch, capfd, verb, *(arg.format(given) for arg in args))
  assert set(seen) - {"orbax"} == {wanted}


def test_a_checkpoint_is_saved_and_found_whatever_the_workdir_is_called(here):
  """Orbax's store refuses `..`, and takes addresses, in which some letters have a meaning."""
  given = "link/../Café 🎈/a:b?c#d%20"
  state = TrainState(jnp.int32(3), {"w": jnp.ones(2)}, (), {"w": jnp.zeros(2)}, NOTHING)
  folder = epath.Path(paths.absolute(given)) / "checkpoints"
  with checkpoint.Checkpoints(folder, keep=1, on_saved=lambda *_: None) as checkpoints:
    checkpoints.save(3, state)
  found = checkpoint.open_weights(given, "raw")
  assert found.step == 3
  assert tensors.materialize(found.params)["w"].tolist() == [1, 1]


def test_a_run_goes_on_with_paths_that_were_stored_as_given_or_have_moved(here):
  """Earlier versions stored relative paths."""
  stored, models = typed(tiny.get_config(), components="../model"), here.parent / "model"
  models.mkdir()
  resume.store(epath.Path(here), stored, {})
  resume.check_config(epath.Path(here), dataclasses.replace(stored, components=str(models)))
  resume.store(epath.Path(here), dataclasses.replace(stored, components="/gone/model"), {})
  resume.check_config(epath.Path(here), dataclasses.replace(stored, components=str(models)))
  with pytest.raises(UserError, match="components"):
    resume.check_config(epath.Path(here), dataclasses.replace(stored, components="tiny"))
