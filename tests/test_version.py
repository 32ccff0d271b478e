"""Files say which version of the package wrote them, and messages name it if one does not load."""

import json
import re

import jax
import numpy as np
import pytest
from drawn import DIT_CONFIG, draw
from etils import epath
from test_checkpoint import make_state, save_steps, shapes_of
from typed_config import typed

import cogvideox_jax
from cogvideox_jax import version
from cogvideox_jax.config.read import to_dict
from cogvideox_jax.conversion import diffusers, orbax
from cogvideox_jax.conversion.components import TRANSFORMER
from cogvideox_jax.conversion.folder import open_network
from cogvideox_jax.data import digests
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.training import initial_weights, resume
from configs import tiny

NOW = version.__version__
# The version that wrote a file -> how a message names it, or nothing.
WRITERS = {
  NOW: "",
  "0.9.9": f"It was written by version 0.9.9 of cogvideox_jax; this is version {NOW}.",
  None: f"It was written by a version before 0.2 of cogvideox_jax; this is version {NOW}.",
}


@pytest.fixture(params=WRITERS, ids=str)
def writer(request):
  """A version that writes a file; None stands for one that did not write its number."""
  return request.param


@pytest.fixture(scope="module")
def config():
  return typed(tiny.get_config())


def set_writer(record_folder: epath.Path, writer: str | None) -> None:
  """Makes a checkpoint look as if that version had written it."""
  record = json.loads((record_folder / digests.NAME).read_text())
  arrays, files = record["arrays"], record["files"]
  record = {"arrays": arrays, "files": files} | ({"version": writer} if writer else {})
  digest = digests._hash_json(record)
  (record_folder / digests.NAME).write_text(json.dumps({"sha256": digest, **record}))


def assert_named(writer, message: str) -> None:
  assert WRITERS[writer] in message
  if not WRITERS[writer]:
    assert "written by" not in message


def test_the_version_of_the_package_is_one():
  assert cogvideox_jax.__version__ == NOW
  assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", NOW)
  first = tuple(map(int, version.FIRST_RECORDED.split(".")))
  assert tuple(map(int, NOW.split(".")[:2])) >= first


def write_transformer(folder: epath.Path, change=lambda params: None) -> epath.Path:
  """An Orbax component folder; returns the folder of its arrays."""
  config, params = draw(DiT, DIT_CONFIG)
  change(params)
  orbax.write_weights(folder, params)
  diffusers.write_fields(folder, diffusers.CONFIG, TRANSFORMER.write_config(config))
  return folder / orbax.FOLDER


def test_orbax_folders_and_checkpoints_say_the_version(tmp_path):
  folder = epath.Path(tmp_path)
  assert digests.version(write_transformer(folder / "transformer")) == NOW
  save_steps(folder / "checkpoints", [1])
  assert digests.version(folder / "checkpoints" / "1") == NOW


def test_the_digest_of_a_checkpoint_does_not_depend_on_the_version(tmp_path, monkeypatch):
  folder = epath.Path(tmp_path)
  _, _, saved = save_steps(folder / "now", [1])
  monkeypatch.setattr(digests, "__version__", "0.9.9")
  _, _, saved_later = save_steps(folder / "later", [1])
  assert digests.version(folder / "later" / "1") == "0.9.9"
  assert saved == saved_later


@pytest.mark.parametrize(
  "change",
  [
    lambda params: params["blocks"].pop("mlp"),
    lambda params: params.update(more=np.zeros(2)),
    lambda params: params["out"].update(bias=np.zeros(3)),
  ],
  ids=["missing", "unknown", "shape"],
)
def test_orbax_arrays_that_do_not_fit_name_their_writer(tmp_path, writer, change):
  folder = epath.Path(tmp_path)
  set_writer(write_transformer(folder, change), writer)
  with pytest.raises(UserError) as error:
    open_network("transformer", folder)
  assert_named(writer, str(error.value))


def test_a_config_beside_orbax_arrays_that_is_not_supported_names_its_writer(tmp_path, writer):
  folder = epath.Path(tmp_path)
  set_writer(write_transformer(folder), writer)
  fields, _ = diffusers.read_fields(folder, diffusers.CONFIG)
  diffusers.write_fields(folder, diffusers.CONFIG, {**fields, "activation_fn": "relu"})
  with pytest.raises(UserError, match="activation_fn is 'relu'") as error:
    open_network("transformer", folder)
  assert_named(writer, str(error.value))


def test_a_config_beside_safetensors_names_no_writer(tmp_path):
  folder = epath.Path(tmp_path)
  config, params = draw(DiT, DIT_CONFIG)
  diffusers.save_transformer(folder, config, params)
  fields, _ = diffusers.read_fields(folder, diffusers.CONFIG)
  diffusers.write_fields(folder, diffusers.CONFIG, {**fields, "activation_fn": "relu"})
  with pytest.raises(UserError, match="activation_fn is 'relu'") as error:
    open_network("transformer", folder)
  assert "written by" not in str(error.value)


def with_other_arrays(state):
  """A state with another set of arrays."""
  return state._replace(ema={"more": state.ema})


def with_other_shapes(state):
  """A state with the same arrays in other shapes."""
  return state._replace(ema=jax.tree.map(lambda x: x.update(shape=(*x.shape, 2)), state.ema))


@pytest.mark.parametrize("change", [with_other_arrays, with_other_shapes])
def test_a_checkpoint_of_another_model_names_its_writer(tmp_path, writer, change):
  folder = epath.Path(tmp_path)
  checkpoints, _, _ = save_steps(folder, [1])
  set_writer(folder / "1", writer)
  wanted = change(shapes_of(make_state({"data": 1, "fsdp": 8})))
  with pytest.raises(UserError, match=r"step 1: its arrays are not this model's: .*ema/") as error:
    checkpoints.restore(wanted)
  assert_named(writer, str(error.value))


def test_initial_weights_of_another_model_name_their_writer(tmp_path, writer):
  folder = epath.Path(tmp_path)
  save_steps(folder / "checkpoints", [1])
  set_writer(folder / "checkpoints" / "1", writer)
  with pytest.raises(UserError, match="has another transformer than") as error:
    initial_weights.load_initial(str(folder), {"other": np.zeros(2)})
  assert_named(writer, str(error.value))


def change_stored_config(workdir: epath.Path, change, writer: str | None) -> None:
  """Edits config.json; `change` changes its fields in place."""
  fields = json.loads((workdir / resume.CONFIG_FILE).read_text())
  assert fields.pop("version") == NOW
  change(fields)
  (workdir / resume.CONFIG_FILE).write_text(
    json.dumps(fields | ({"version": writer} if writer else {}))
  )


@pytest.mark.parametrize(
  "change",
  [lambda fields: fields.update(colour="red"), lambda fields: fields["train"].pop("steps")],
  ids=["unknown", "missing"],
)
def test_a_workdir_with_other_config_keys_names_its_writer(tmp_path, writer, change, config):
  workdir = epath.Path(tmp_path)
  resume.store(workdir, config, {})
  change_stored_config(workdir, change, writer)
  with pytest.raises(UserError) as error:
    resume.read_config(workdir)
  assert_named(writer, str(error.value))
  with pytest.raises(UserError, match="was begun with another config") as error:
    resume.check_config(workdir, config)
  assert_named(writer, str(error.value))


def test_a_workdir_of_another_version_with_the_same_config_goes_on(tmp_path, writer, config):
  workdir = epath.Path(tmp_path)
  resume.store(workdir, config, {"tiny": "abc"})
  change_stored_config(workdir, lambda fields: None, writer)
  resume.check_config(workdir, config)
  assert resume.read_config(workdir) == config
  resume.store(workdir, config, {})
  stored = json.loads((workdir / resume.CONFIG_FILE).read_text())
  expected = {**to_dict(config), "data_digests": {"tiny": "abc"}, "version": NOW}
  assert stored == json.loads(json.dumps(expected))


def test_another_value_of_a_config_key_is_not_blamed_on_the_version(tmp_path, config):
  workdir = epath.Path(tmp_path)
  resume.store(workdir, config, {})
  change_stored_config(workdir, lambda fields: fields.update(seed=99), "0.9.9")
  with pytest.raises(UserError, match=r"config.seed: was 99") as error:
    resume.check_config(workdir, config)
  assert "written by" not in str(error.value)
