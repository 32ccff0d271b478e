"""A workdir of an earlier version, which had fewer config keys, goes on as it began."""

import json

import pytest
from etils import epath
from small_run import make_config, make_inputs
from typed_config import typed

from cogvideox_jax.config import stored
from cogvideox_jax.config.older import newer_keys
from cogvideox_jax.config.read import read, to_dict
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import resume, transformer_run, workdir
from configs import tiny, vae_tiny

# What version 0.1.0 did not have, and what it did instead.
NEWER = {"train.weighting": "tokens", "init.keep": ""}
OLDER_STILL = {"stages.tiny.best": 1.0, "stages.tiny.data": "", "train.growth": "extrapolate"}
VAE_NEWER = {"data.validation_fraction": 0.0, "train.batch_multiple": 1, "validation.every": 0}


def take_out(folder, *names):
  """Makes the config of a workdir one that lacks keys or groups of keys."""
  path = folder / resume.CONFIG_FILE
  fields = json.loads(path.read_text())
  del fields["version"]
  for name in names:
    *groups, last = name.split(".")
    group = fields
    for one in groups:
      group = group[one]
    del group[last]
  path.write_text(json.dumps(fields))


def value_of(config, name):
  group = to_dict(config)
  for one in name.split("."):
    group = group[one]
  return group


@pytest.mark.parametrize(
  ("names", "values"),
  [
    (["train.weighting", "init", "data.limits"], NEWER),
    (["train.weighting", *OLDER_STILL], {"train.weighting": "tokens", **OLDER_STILL}),
    (["data.limits.max_fps", "preview.images"], {}),  # These may change in any run.
  ],
)
def test_keys_that_an_earlier_version_did_not_have_keep_what_it_did(tmp_path, names, values):
  folder = epath.Path(tmp_path)
  config = typed(tiny.get_config(), stages__tiny__best=1.0)
  begun = typed(tiny.get_config(), **{key.replace(".", "__"): x for key, x in values.items()})
  resume.store(folder, begun, {})
  take_out(folder, *names)
  goes_on, line = resume.with_former_keys(folder, config)
  assert {name: value_of(goes_on, name) for name in values} == values
  assert goes_on == begun
  resume.check_config(folder, goes_on)
  assert resume.read_config(folder) == begun
  for name, value in values.items():
    group = name.split(".")[0]
    assert f"config.{name}={value!r}" in line or f"config.{group}" in line
  assert len(line.splitlines()) == bool(values)
  # Each later start goes on in the same way.
  resume.store(folder, goes_on, {})
  assert resume.with_former_keys(folder, config) == (goes_on, line)
  resume.check_config(folder, goes_on)
  assert resume.read_config(folder) == begun


def test_the_vae_goes_on_too(tmp_path):
  folder = epath.Path(tmp_path)
  config = typed(vae_tiny.get_config(), VAETrainConfig)
  resume.store(folder, config, {})
  take_out(folder, *(set(VAE_NEWER) - {"validation.every"}), "validation", "mesh", "cpu_devices")
  goes_on, line = resume.with_former_keys(folder, config)
  assert {name: value_of(goes_on, name) for name in VAE_NEWER} == VAE_NEWER
  assert goes_on.mesh == config.mesh and "mesh" not in line
  resume.check_config(folder, goes_on)
  path = folder / resume.CONFIG_FILE
  assert read(VAETrainConfig, stored.get_config(str(path))).train.batch_multiple == 1


def test_a_key_that_every_version_had_is_still_missed(tmp_path):
  folder, config = epath.Path(tmp_path), typed(tiny.get_config())
  resume.store(folder, config, {})
  take_out(folder, "train.weighting", "optimizer.b2")
  goes_on, _ = resume.with_former_keys(folder, config)
  with pytest.raises(
    UserError, match=r"config\.optimizer\.b2: was absent, is 0\.95\n.*before 0\.2"
  ):
    resume.check_config(folder, goes_on)


def test_a_config_that_is_no_object_has_no_newer_keys():
  assert newer_keys(TrainConfig, 3) == []
  newer = newer_keys(VAETrainConfig, {"train": 3, "data": []})
  assert {key.path[0] for key in newer} >= {"mesh", "sharding", "cpu_devices", "validation"}


@pytest.mark.slow
def test_a_run_of_an_earlier_version_ends_as_it_would_have_and_can_be_loaded(tmp_path, capsys):
  inputs, folders = make_inputs(epath.Path(tmp_path)), [epath.Path(tmp_path) / x for x in "ab"]
  tokens = make_config(inputs, train__weighting="tokens", validation__every=0)
  assert [transformer_run.train(tokens, folder) for folder in folders] == [0, 0]
  (folders[0] / "checkpoints" / "6").rmtree()
  take_out(folders[0], "train.weighting", "init", "data.limits")
  capsys.readouterr()
  assert transformer_run.train(make_config(inputs, validation__every=0), folders[0]) == 0
  printed = capsys.readouterr().out
  assert "which had no config.init, config.train.weighting='tokens': it goes on with" in printed
  ends = [
    json.loads((folder / "checkpoints" / "6" / "digests.json").read_text()) for folder in folders
  ]
  assert ends[0]["arrays"] == ends[1]["arrays"]


def test_sampling_from_such_a_workdir_says_so(tmp_path, capsys):
  folder, config = epath.Path(tmp_path), typed(tiny.get_config())
  resume.store(folder, config, {})
  take_out(folder, "train.weighting")
  with pytest.raises(UserError, match="checkpoint"):  # It has none; its config is read before.
    (folder / "checkpoints").mkdir()
    workdir.load(folder)
  assert "config.train.weighting='tokens'" in capsys.readouterr().out
