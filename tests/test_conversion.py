"""Model folders: theirs to ours and back, and what happens to those that do not fit."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from conversion_models import DIT, NOISE
from safetensors.numpy import load_file, save_file
from typed_config import typed

from cogvideox_jax.conversion import component_fields, diffusers, names, tensors
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.models.vae_config import VAEConfig
from configs import base

MODELS = Path(__file__).parent / "data" / "goldens" / "models"
KINDS = {
  "transformer_2b": (diffusers.load_transformer, diffusers.save_transformer),
  "transformer_5b": (diffusers.load_transformer, diffusers.save_transformer),
  "transformer_15": (diffusers.load_transformer, diffusers.save_transformer),
  "vae": (diffusers.load_vae, diffusers.save_vae),
  "t5": (diffusers.load_text_encoder, diffusers.save_text_encoder),
}


def weights_of(folder: Path) -> dict[str, np.ndarray]:
  named = {}
  for file in folder.glob("*.safetensors"):
    named.update(load_file(file))
  return named


def assert_same_weights(folder: Path, expected: dict[str, np.ndarray]):
  found = weights_of(folder)
  assert found.keys() == expected.keys()
  for name, tensor in expected.items():
    assert found[name].dtype == tensor.dtype, name
    assert found[name].tobytes() == tensor.tobytes(), name


def write_weights(folder: Path, name: str, change):
  """A copy of a reference folder with its weights changed by `change`."""
  shutil.copytree(MODELS / name, folder)
  (file,) = folder.glob("*.safetensors")
  named = load_file(file)
  change(named)
  save_file(named, file)


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_is_bit_equal_and_keeps_the_config(kind, tmp_path):
  load, save = KINDS[kind]
  save(tmp_path, *load(MODELS / kind))
  assert_same_weights(tmp_path, weights_of(MODELS / kind))
  before = json.loads((MODELS / kind / "config.json").read_text())
  after = json.loads((tmp_path / "config.json").read_text())
  free = {"sample_height", "sample_width"} if kind == "vae" else set()  # Sizes of its tiles only.
  assert {k: v for k, v in after.items() if k not in free} == {
    k: v for k, v in before.items() if k in after and k not in free
  }


@pytest.mark.parametrize("kind", ["transformer_5b", "vae", "t5"])
def test_bfloat16_weights_in_shards_survive_a_round_trip(kind, tmp_path, monkeypatch):
  load, save = KINDS[kind]
  config, params = load(MODELS / kind)
  params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
  monkeypatch.setattr(diffusers, "MAX_SHARD_BYTES", 20_000)
  save(tmp_path / "first", config, params)
  (index,) = (tmp_path / "first").glob("*.safetensors.index.json")
  shards = sorted((tmp_path / "first").glob("*.safetensors"))
  assert len(shards) > 1
  assert max(file.stat().st_size for file in shards) < 30_000
  for name, file in json.loads(index.read_text())["weight_map"].items():
    assert name in load_file(tmp_path / "first" / file)
  save(tmp_path / "second", *load(tmp_path / "first"))
  assert_same_weights(tmp_path / "second", weights_of(tmp_path / "first"))


def test_saving_over_an_older_model_leaves_none_of_its_files(tmp_path, monkeypatch):
  loaded = diffusers.load_vae(MODELS / "vae")
  with monkeypatch.context() as patch:
    patch.setattr(diffusers, "MAX_SHARD_BYTES", 40_000)
    diffusers.save_vae(tmp_path, *loaded)
  diffusers.save_vae(tmp_path, *diffusers.load_vae(tmp_path))
  assert {file.name for file in tmp_path.iterdir()} == {
    "config.json",
    "diffusion_pytorch_model.safetensors",
  }
  assert_same_weights(tmp_path, weights_of(MODELS / "vae"))


def test_saving_deletes_no_file_that_the_folders_index_does_not_name(tmp_path, monkeypatch):
  loaded, stem = diffusers.load_vae(MODELS / "vae"), "diffusion_pytorch_model"
  with monkeypatch.context() as patch:
    patch.setattr(diffusers, "MAX_SHARD_BYTES", 40_000)
    diffusers.save_vae(tmp_path, *loaded)
  theirs = [
    f"{stem}.fp16.safetensors",
    f"{stem}.safetensors.index.fp16.json",
    f"{stem}_before.safetensors",
    f"{stem}-00009-of-00009.safetensors",
    f"{stem}.safetensors.bak",
  ]
  for name in theirs:
    (tmp_path / name).write_text("theirs")
  index = tmp_path / f"{stem}.safetensors.index.json"
  fields = json.loads(index.read_text())
  fields["weight_map"]["other"] = f"{stem}_before.safetensors"  # No name of a writer.
  index.write_text(json.dumps(fields))
  diffusers.save_vae(tmp_path, *loaded)
  kept = {file.name for file in tmp_path.iterdir()}
  assert kept == {*theirs, "config.json", f"{stem}.safetensors"}
  assert {(tmp_path / name).read_text() for name in theirs} == {"theirs"}
  for mine, read in zip(
    jax.tree.leaves(loaded[1]), jax.tree.leaves(diffusers.load_vae(tmp_path)[1]), strict=True
  ):
    np.testing.assert_array_equal(mine, read)


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("transformer_5b", "transformer_blocks.1.attn1.to_k.weight"),
    ("transformer_5b", "norm_out.linear.bias"),
    ("vae", "decoder.up_blocks.3.resnets.0.conv_shortcut.weight"),
    ("t5", "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"),
  ],
)
def test_a_missing_misshapen_or_unknown_tensor_is_named(kind, name, tmp_path):
  load, _ = KINDS[kind]
  write_weights(tmp_path / "missing", kind, lambda named: named.pop(name))
  with pytest.raises(UserError, match=f"missing: {name}"):
    load(tmp_path / "missing")
  write_weights(
    tmp_path / "misshapen", kind, lambda named: named.update({name: named[name][..., :-1].copy()})
  )
  with pytest.raises(UserError, match=f"{name} has shape"):
    load(tmp_path / "misshapen")
  write_weights(
    tmp_path / "unknown", kind, lambda named: named.update({f"{name}.lora": named[name]})
  )
  with pytest.raises(UserError, match=f"not known: {name}.lora"):
    load(tmp_path / "unknown")


def test_parameters_that_are_not_the_configs_are_named_and_nothing_is_overwritten(tmp_path):
  config, params = diffusers.load_vae(MODELS / "vae")
  diffusers.save_vae(tmp_path, config, params)
  bad = jax.tree.map(lambda x: x, params)
  bad["encoder"]["conv_in"]["bias"] = np.zeros(5, np.float32)
  with pytest.raises(UserError, match="encoder/conv_in/bias has shape"):
    diffusers.save_vae(tmp_path, config, bad)
  del bad["encoder"]["conv_in"]["bias"]
  with pytest.raises(UserError, match="missing: encoder/conv_in/bias"):
    diffusers.save_vae(tmp_path, config, bad)
  assert_same_weights(tmp_path, weights_of(MODELS / "vae"))


def test_either_name_of_t5s_embedding_is_read(tmp_path):
  other = "encoder.embed_tokens.weight"
  _, expected = diffusers.load_text_encoder(MODELS / "t5")
  write_weights(
    tmp_path / "renamed", "t5", lambda named: named.update({other: named.pop("shared.weight")})
  )
  write_weights(
    tmp_path / "both", "t5", lambda named: named.update({other: named["shared.weight"]})
  )
  for folder in ("renamed", "both"):
    _, params = diffusers.load_text_encoder(tmp_path / folder)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, expected)))


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("activation_fn", "gelu"),
    ("norm_eps", 1e-6),
    ("patch_bias", False),
  ],
)
def test_a_transformer_of_an_unsupported_kind_is_refused_by_its_field(field, value):
  fields = {**component_fields.write_transformer(DIT), field: value}
  with pytest.raises(UserError, match=f"config.json: {field} is {value!r}.* not supported"):
    component_fields.read_transformer(fields, "config.json")


@pytest.mark.parametrize(
  ("positions", "patch", "stored"),
  [
    ("sincos", (1, 2, 2), None),
    ("rope", (1, 2, 2), None),
    ("rope_index", (2, 2, 2), None),
    ("rope_index", (1, 2, 2), "rope_index"),
  ],
)
def test_the_position_rule_is_written_only_where_diffusers_fields_do_not_say_it(
  positions, patch, stored
):
  config = dataclasses.replace(DIT, positions=positions, patch=patch)
  fields = json.loads(json.dumps(component_fields.write_transformer(config)))
  assert fields.get("position_rule") == stored
  assert component_fields.read_transformer(fields, "config.json") == config


def test_fields_that_older_files_lack_mean_what_they_meant_then():
  fields = component_fields.write_transformer(dataclasses.replace(DIT, positions="rope"))
  newer = ("patch_size_t", "patch_bias", "ofs_embed_dim", "use_learned_positional_embeddings")
  old = {name: value for name, value in fields.items() if name not in newer}
  assert component_fields.read_transformer(old, "") == component_fields.read_transformer(fields, "")
  schedule = component_fields.write_noise(NOISE)
  del schedule["snr_shift_scale"]
  assert component_fields.read_noise(schedule, "").snr_shift == 3.0


def test_a_schedule_survives_a_round_trip_and_other_kinds_are_refused(tmp_path):
  diffusers.save_scheduler(tmp_path, NOISE)
  assert diffusers.load_scheduler(tmp_path) == NOISE
  for field, value in (("prediction_type", "flow"), ("beta_schedule", "linear")):
    with pytest.raises(UserError, match=f"{field} is {value!r}"):
      component_fields.read_noise({**component_fields.write_noise(NOISE), field: value}, "")


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (lambda folder: (folder / "config.json").unlink(), r"There is no .*config\.json"),
    (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not JSON"),
    (lambda folder: (folder / "config.json").write_text("{}"), "lacks in_channels"),
    (
      lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(),
      r"no weights: diffusion_pytorch_model\.safetensors",
    ),
    (
      lambda folder: (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"\x01" * 99),
      r"diffusion_pytorch_model\.safetensors is damaged",
    ),
  ],
)
def test_a_damaged_folder_is_one_clear_message(spoil, message, tmp_path):
  shutil.copytree(MODELS / "vae", tmp_path / "vae")
  spoil(tmp_path / "vae")
  with pytest.raises(UserError, match=message):
    diffusers.load_vae(tmp_path / "vae")


def test_models_and_parts_that_are_not_there_are_named(tmp_path):
  with pytest.raises(UserError, match=r"no model at .*nowhere(?s:.*)hf download"):
    open_model(tmp_path / "nowhere")
  with pytest.raises(UserError, match="has no vae/"):
    open_model(tmp_path).vae()
  with pytest.raises(UserError, match=r"no .*model_index\.json"):
    open_model(tmp_path).settings()


def test_every_tensor_of_a_published_file_is_in_the_tables():
  """Counted from shapes alone, at the published sizes."""
  transformer = typed(base.get_config()).model
  found = [
    (DiT, transformer, names.transformer, 736, 1_693_783_872),
    (VAE, VAEConfig(), names.vae, 436, 215_583_907),
  ]
  for model, config, table, count, elements in found:
    slots = tensors.slots(table(config), tensors.abstract_params(model, config))
    assert len({slot.name for slot in slots}) == count
    assert sum(math.prod(slot.shape) for slot in slots) == elements
