"""The forms of a config: every key has a field, JSON keeps its bytes, and each key is described."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest
from in_process import run_here
from ml_collections import ConfigDict
from typed_config import typed

from cogvideox_jax.config.ablation_schema import VAEAblationConfig
from cogvideox_jax.config.help import describe
from cogvideox_jax.config.read import leaves, read, to_json
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit_config import DiTConfig
from configs import base, tiny, tiny_stages, vae_tiny

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def schema_of(name: str) -> type:
  if name in ("table1", "vae_recipe"):
    return VAEAblationConfig
  return VAETrainConfig if name.startswith("vae") else TrainConfig


def config_of(name: str) -> ConfigDict:
  return importlib.import_module(f"configs.{name}").get_config()


def keys_of(config: ConfigDict, prefix: str = "config") -> set[str]:
  """Dotted names of all values of a ConfigDict."""
  found = set()
  for name, value in config.items():
    inner = isinstance(value, ConfigDict)
    found |= keys_of(value, f"{prefix}.{name}") if inner else {f"{prefix}.{name}"}
  return found


@pytest.mark.parametrize("name", NAMES)
def test_every_key_has_a_field_and_every_field_a_key(name):
  config = config_of(name)
  assert {leaf.name for leaf in leaves(typed(config, schema_of(name)))} == keys_of(config)


@pytest.mark.parametrize("name", NAMES)
def test_the_json_of_a_workdir_keeps_its_bytes_and_gives_the_same_config(name):
  config = config_of(name)
  found = typed(config, schema_of(name))
  assert to_json(found) == config.to_json()
  assert read(schema_of(name), json.loads(config.to_json())) == found


@pytest.mark.parametrize(("config", "schema"), [(base, TrainConfig), (vae_tiny, VAETrainConfig)])
def test_a_key_without_a_field_and_a_field_without_a_key_are_named(config, schema):
  config = config.get_config().unlock()
  config.optimizer.b3 = 0.9
  with pytest.raises(UserError, match=r"No such config key: config\.optimizer\.b3\n.*b1"):
    read(schema, config)
  del config.optimizer.b3, config.optimizer.b2
  with pytest.raises(UserError, match=r"The config has no key config\.optimizer\.b2"):
    read(schema, config)


def test_a_key_that_is_newer_than_a_config_takes_the_default_of_its_field():
  values = json.loads(base.get_config().to_json())
  del values["model"]["ofs_width"]
  assert read(TrainConfig, values).model.ofs_width == 0


@pytest.mark.parametrize(
  ("key", "value", "wanted"),
  [
    ("model.depth", 2.5, "config.model.depth is 2.5; it must be a whole number"),
    ("model.depth", True, "config.model.depth is True; it must be a whole number"),
    ("model.patch", [1, 2], "config.model.patch is [1, 2]; it must hold three whole numbers"),
    ("noise.snr_shift", "3", "config.noise.snr_shift is '3'; it must be a number"),
    ("train.explicit_uniform", 1, "config.train.explicit_uniform is 1; it must be True or False"),
    ("remat", None, "config.remat is None; it must be a text"),
    ("stages.stage1.share", None, "config.stages.stage1.share is None; it must be a number"),
    ("preview.prompts", "a cat", "config.preview.prompts is 'a cat'; it must hold texts"),
    ("optimizer", 3, "config.optimizer is 3; it must be a group of keys"),
    ("stages", [], "config.stages is []; it must be a group of keys"),
    ("stages", {"a": {}}, "config.stages.a must be a stage: write base.stage(...)"),
    ("data.mixture", {"a": {"x": 1}}, "config.data.mixture.a must have a path and a weight"),
  ],
)
def test_a_value_of_another_type_is_named(key, value, wanted):
  values = json.loads(base.get_config().to_json())
  *groups, name = key.split(".")
  group = values
  for one in groups:
    group = group[one]
  group[name] = value
  with pytest.raises(UserError, match=re.escape(wanted)):
    read(TrainConfig, values)


def test_lists_become_tuples_whole_numbers_floats_and_stages_stand_in_order():
  config = tiny_stages.get_config()
  values = json.loads(config.to_json())
  values["stages"] = dict(reversed(values["stages"].items()))
  values["optimizer"]["clip_norm"] = 1
  found = read(TrainConfig, values)
  assert list(found.stages) == ["stage1", "stage2", "stage3", "stage4"]
  assert found.stages["stage1"].sizes == ((16, 16), (16, 24), (24, 16))
  assert type(found.optimizer.clip_norm) is float
  assert type(found.model) is DiTConfig


def test_a_typed_config_cannot_be_changed():
  config = typed(tiny.get_config())
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.seed = 1
  with pytest.raises(TypeError):
    config.stages["other"] = config.stages["tiny"]


@pytest.mark.parametrize("name", NAMES)
def test_the_help_has_every_key_with_its_value_type_range_meaning_and_source(name):
  config = typed(config_of(name), schema_of(name))
  text = describe(config)
  for leaf in leaves(config):
    block = text[text.index(f"{leaf.name} = {leaf.value!r}\n") :]
    described = " ".join(re.search(r"(\n    .+)+", block)[0].split())
    assert leaf.key.meaning in described
    assert described.endswith(f"Source: {leaf.key.source}.")
    assert ", ".join(leaf.key.choices) in described
    if isinstance(leaf.value, int | float) and not isinstance(leaf.value, bool):
      assert re.match(
        rf"(int|float|int or float), {re.escape(leaf.key.allowed.wanted)}\.", described
      )
    else:
      assert re.match(r"(str, |bool, True or False\.|tuple of |\(int, int, int\))", described)


def test_the_help_describes_groups_that_have_no_name_yet():
  text = describe(typed(base.get_config()))
  assert "config.data.mixture.NAME.weight\n    float, at least 0." in text


@pytest.mark.parametrize(
  ("verb", "name", "line"),
  [
    ("train", "tiny", "config.train.steps = 7\n    int, above 0."),
    ("train_vae", "vae_tiny", "config.train.steps = 7\n    int, above 0."),
    ("encode", "tiny", "config.train.steps = 7\n    int, above 0."),
  ],
)
def test_help_config_needs_no_other_flag_and_knows_the_overrides(
  monkeypatch, capfd, verb, name, line
):
  flags = ["--help_config", f"--config=configs/{name}.py", "--config.train.steps=7"]
  result = run_here(monkeypatch, capfd, verb, *flags, folder=ROOT)
  assert result.code == 0, result.errors
  assert line in result.output
