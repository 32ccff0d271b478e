"""A dataset knows what encoded it, and training refuses what its model would not decode."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from drawn import T5_CONFIG, VAE_CONFIG, draw
from etils import epath
from small_run import make_config, write_dataset

from cogvideox_jax.config.schema import SourceConfig
from cogvideox_jax.conversion import component_digests, diffusers, orbax
from cogvideox_jax.conversion.component_digests import describe, digest
from cogvideox_jax.conversion.components import TEXT_ENCODER
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.data import encoded_by, shard_notes
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.shards import ShardWriter
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.t5 import T5Encoder
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.training import encoders, transformer_run


def make_model(folder):
  """A model folder without a transformer, which encoding needs not."""
  diffusers.save_vae(folder / "vae", *draw(VAE, VAE_CONFIG))
  diffusers.save_text_encoder(folder / "text_encoder", *draw(T5Encoder, T5_CONFIG))
  diffusers.save_tokenizer(folder / "tokenizer", open_model("tiny").tokenizer())
  return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  """FOLDER/model, and FOLDER/a and FOLDER/b, datasets that it encoded."""
  folder = epath.Path(tmp_path_factory.mktemp("inputs"))
  make_model(folder / "model")
  record = describe(open_model(folder / "model"), "the first model", "zeros", 8.0)
  for number, name in enumerate("ab"):
    write_dataset(folder / name, number, clips=4)
    encoded_by.write(folder / name, record)
  return folder


def change(folder, **changes):
  """A dataset whose record differs."""
  record = encoded_by.read(folder)
  encoded_by.write(folder, record._replace(**changes))
  return Dataset(folder)


def copy(inputs, folder):
  write_dataset(folder, 3, clips=4)
  encoded_by.write(folder, encoded_by.read(inputs / "a"))
  return folder


def change_one_weight(folder, component):
  """Makes a model that differs in one weight of a component."""
  make_model(folder)
  network, config = {"vae": (VAE, VAE_CONFIG), "text_encoder": (T5Encoder, T5_CONFIG)}[component]
  _, params = draw(network, config)
  jax.tree.leaves(params)[-1].flat[-1] += 1e-6
  save = {"vae": diffusers.save_vae, "text_encoder": diffusers.save_text_encoder}[component]
  save(folder / component, config, params)


def test_datasets_of_the_configs_own_components_pass_without_a_word(inputs):
  config = make_config(inputs)
  assert encoders.check(config, [Dataset(inputs / "a"), Dataset(inputs / "b")]) == []


@pytest.mark.parametrize(
  ("component", "title"),
  [("vae", "VAE"), ("text_encoder", "text encoder")],
)
def test_one_other_weight_is_refused_and_both_models_are_named(inputs, tmp_path, component, title):
  other = epath.Path(tmp_path) / "other"
  change_one_weight(other, component)
  config = make_config(inputs, components=str(other))
  with pytest.raises(UserError) as caught:
    encoders.check(config, [Dataset(inputs / "a")])
  message = str(caught.value)
  ours = getattr(describe(open_model(other), "", "zeros", 8.0), component)
  theirs = getattr(encoded_by.read(inputs / "a"), component)
  assert f"another {title} than that of config.components" in message
  assert str(inputs / "a") in message and len(message.splitlines()) <= 8
  assert f"the first model, sha256 {theirs[:12]}\n" in message
  assert f"{other}, sha256 {ours[:12]}\n" in message


def test_every_dataset_of_a_mixture_is_compared(inputs, tmp_path):
  other = change(copy(inputs, epath.Path(tmp_path) / "c"), vae="0" * 64, model="another")
  with pytest.raises(UserError, match=r"(?s)/c were encoded by another VAE.*another, sha256 0000"):
    encoders.check(make_config(inputs), [Dataset(inputs / "a"), other])


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"tokenizer": "0" * 64}, "another tokenizer than that of config.components"),
    ({"scaling_factor": 1.15258426}, r"(?s)scaling factor\n1\.15258426, that .* has 0\.7\."),
    ({"fps": 16.0}, r"have 16 frames a second, but config\.data\.fps is 8\.\nGive --config\.data"),
  ],
)
def test_what_would_spoil_the_model_is_refused(inputs, tmp_path, changes, words):
  dataset = change(copy(inputs, epath.Path(tmp_path) / "c"), **changes)
  with pytest.raises(UserError, match=words):
    encoders.check(make_config(inputs), [dataset])


def test_what_does_no_harm_is_a_line(inputs, tmp_path):
  folder = copy(inputs, epath.Path(tmp_path) / "c")
  lines = encoders.check(make_config(inputs), [change(folder, text_drop="empty", version="0.1")])
  assert len(lines) == 2
  assert "config.text.drop empty, now it is zeros" in lines[0]
  assert "encoded by version 0.1 of cogvideox_jax" in lines[1]


def test_older_datasets_load_with_one_line(inputs, tmp_path):
  folders = [epath.Path(tmp_path) / name for name in ("one", "two")]
  for folder in folders:
    write_dataset(folder, 0, clips=4)
  (line,) = encoders.check(make_config(inputs), map(Dataset, folders))
  assert all(str(folder) in line for folder in folders) and "cannot be checked" in line
  (line,) = encoders.check(make_config(inputs), map(Dataset, [folders[0], inputs / "a"]))
  assert "cannot be checked" in line


def test_components_without_weights_are_said_not_to_be_checked(inputs, tmp_path):
  model = epath.Path(tmp_path) / "model"
  make_model(model)
  (model / "text_encoder").rmtree()
  (line,) = encoders.check(make_config(inputs, components=str(model)), [Dataset(inputs / "a")])
  assert "no weights of its text encoder" in line and "cannot be checked" in line


def test_the_digest_is_that_of_the_values_in_any_file_and_wider_type(tmp_path):
  config, params = draw(T5Encoder, T5_CONFIG)
  rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
  wider = jax.tree.map(lambda x: x.astype(np.float32), rounded)
  assert digest(rounded) == digest(wider) != digest(params)
  diffusers.save_text_encoder(tmp_path / "plain" / "text_encoder", config, params)
  arrays = epath.Path(tmp_path) / "arrays" / "text_encoder"
  orbax.write_weights(arrays, params)
  diffusers.write_fields(arrays, "config.json", TEXT_ENCODER.write_config(config))
  for kind in ("plain", "arrays"):
    assert digest(open_model(tmp_path / kind).open("text_encoder")[1]) == digest(params)


def test_large_parameters_are_hashed_in_chunks(monkeypatch):
  _, params = draw(T5Encoder, T5_CONFIG)
  whole = digest(params)
  monkeypatch.setattr(component_digests, "CHUNK", 5)
  assert digest(params) == whole


def test_a_dataset_is_not_finished_with_other_networks(inputs, tmp_path):
  record = encoded_by.read(inputs / "a")
  made_from = shard_notes.identity("same")
  ShardWriter(tmp_path, 1, made_from, record)
  assert encoded_by.read(epath.Path(tmp_path)) == record
  later = record._replace(version="later", text_drop="empty")
  ShardWriter(tmp_path, 1, made_from, later)
  assert encoded_by.read(epath.Path(tmp_path)) == record  # As it was begun.
  with pytest.raises(UserError, match="other files or settings"):
    ShardWriter(tmp_path, 1, made_from, record._replace(tokenizer="0" * 64))


def test_what_an_earlier_version_began_gets_its_record_without_a_version(inputs, tmp_path):
  record = encoded_by.read(inputs / "a")
  ShardWriter(tmp_path, 1, shard_notes.identity("same"))
  ShardWriter(tmp_path, 1, shard_notes.identity("same"), record)
  assert encoded_by.read(epath.Path(tmp_path)) == record._replace(version=None)


def test_a_damaged_record_is_one_message(inputs, tmp_path):
  folder = copy(inputs, epath.Path(tmp_path) / "c")
  for text in ("{", "[]", json.dumps({"model": "x"})):
    (folder / "encoded_by.json").write_text(text)
    with pytest.raises(UserError, match=r"encoded_by\.json is damaged .*\nDelete it"):
      Dataset(folder)


def test_the_weights_are_read_for_all_datasets_once(inputs, monkeypatch):
  calls = []
  monkeypatch.setattr(
    component_digests, "describe", lambda *args: calls.append(args) or describe(*args)
  )
  encoders.check(make_config(inputs), [Dataset(inputs / "a"), Dataset(inputs / "b")])
  assert len(calls) == 1


def test_a_run_on_a_mixture_checks_before_it_compiles(inputs, tmp_path):
  change(copy(inputs, epath.Path(tmp_path) / "c"), vae="0" * 64)
  config = make_config(inputs)
  mixture = {
    "one": SourceConfig(str(inputs / "a"), 1.0),
    "two": SourceConfig(str(tmp_path / "c"), 1.0),
  }
  data = dataclasses.replace(config.data, path="", mixture=mixture, validation_fraction=0.0)
  validation = dataclasses.replace(config.validation, every=0)
  config = dataclasses.replace(config, data=data, validation=validation)
  with pytest.raises(UserError, match="another VAE"):
    transformer_run.train(config, epath.Path(tmp_path) / "run")
