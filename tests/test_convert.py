"""The verb `convert`: every layout into every other, bit by bit, and what it refuses."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from converted import assert_same_bits, json_files, run, weights
from diffusers import DiffusionPipeline
from drawn import DIT_CONFIG, draw
from etils import epath
from model_folder import make_model
from safetensors.numpy import load_file, save_file
from small_run import make_config

from cogvideox_jax.conversion import diffusers, orbax, sat_release, tensors
from cogvideox_jax.conversion.components import TRANSFORMER
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.data import digests
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference.image_to_video import ImageToVideo
from cogvideox_jax.inference.pipeline import Pipeline
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.training import checkpoint

GOLDENS = Path(__file__).parent / "data" / "goldens"
PIPELINES = sorted((GOLDENS / "pipelines").iterdir())
SHAPED = (  # What shapes tell of a transformer's config.
  "attention_head_dim",
  "in_channels",
  "num_attention_heads",
  "num_layers",
  "ofs_embed_dim",
  "out_channels",
  "patch_size",
  "patch_size_t",
  "text_embed_dim",
  "time_embed_dim",
)
pytestmark = pytest.mark.usefixtures("forked_torch")
CALL = {"num_inference_steps": 2, "num_frames": 9, "output_type": "latent"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
  return make_model(tmp_path_factory.mktemp("model"))


# Each layout and each source once; all pairs in the slow tests.
PAIRS = [
  pytest.param(path.name, layout, marks=[pytest.mark.slow] * ((n + m) % 2))
  for n, path in enumerate(PIPELINES)
  for m, layout in enumerate(("orbax", "sat"))
]


@pytest.mark.parametrize(("source", "layout"), PAIRS)
def test_a_model_of_diffusers_comes_back_bit_by_bit_with_its_configs(source, layout, tmp_path):
  folder = GOLDENS / "pipelines" / source
  there = run(folder, tmp_path / "there", layout)
  back = run(there, tmp_path / "back", "diffusers")
  assert_same_bits(weights(back), weights(folder))
  assert json_files(back) == json_files(folder)
  assert not list(there.rglob("*.safetensors")) or layout == "sat"


@pytest.mark.slow
def test_orbax_and_sat_pass_into_each_other(model, tmp_path):
  first = run(model, tmp_path / "orbax", "orbax")
  second = run(first, tmp_path / "sat", "sat")
  third = run(second, tmp_path / "again", "orbax")
  back = run(third, tmp_path / "back", "diffusers")
  assert_same_bits(weights(back), weights(model))
  assert json_files(back) == json_files(model)


def test_a_folder_of_orbax_arrays_makes_the_same_video(model, tmp_path):
  there = run(model, tmp_path / "there", "orbax")
  videos = [Pipeline.from_pretrained(path)("a ball", **CALL).frames for path in (model, there)]
  np.testing.assert_array_equal(*videos)


def test_orbax_itself_reads_the_arrays(model, tmp_path):
  from orbax.checkpoint import v1 as ocp

  there = run(model, tmp_path / "there", "orbax")
  found = tensors.flatten(ocp.load(there / "transformer" / "orbax"))
  _, expected = diffusers.load_transformer(model / "transformer")
  assert_same_bits(found, tensors.flatten(expected))


@pytest.mark.parametrize("source", [path.name for path in PIPELINES])
def test_diffusers_opens_what_is_written(source, tmp_path):
  there = run(GOLDENS / "pipelines" / source, tmp_path / "there", "orbax")
  back = run(there, tmp_path / "back", "diffusers")
  pipe = DiffusionPipeline.from_pretrained(back, tokenizer=None)
  assert type(pipe).__name__ == json.loads((back / "model_index.json").read_text())["_class_name"]
  theirs = {name: x.numpy() for name, x in pipe.transformer.state_dict().items()}
  ours = load_file(back / "transformer" / "diffusion_pytorch_model.safetensors")
  assert_same_bits(ours, {name: theirs[name] for name in ours})


def test_a_release_of_sats_without_configs_of_ours_is_known_by_its_shapes(tmp_path):
  source = next(path for path in PIPELINES if path.name.startswith("i2v_15"))
  there = run(source, tmp_path / "there", "sat")
  for file in [*there.rglob("config.json"), there / "model_index.json"]:
    if "t5" not in str(file):
      file.unlink()
  shutil.rmtree(there / "scheduler")
  shutil.rmtree(there / "vae")
  back = run(there, tmp_path / "back", "diffusers")
  before = json.loads((source / "transformer" / "config.json").read_text())
  after = json.loads((back / "transformer" / "config.json").read_text())
  shaped = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
  )
  for name in (*shaped, "patch_size", "patch_size_t", "ofs_embed_dim", "text_embed_dim"):
    assert after[name] == before[name], name
  assert after["sample_frames"] == 81
  scheduler = json.loads((back / "scheduler" / "scheduler_config.json").read_text())
  assert scheduler["snr_shift_scale"] == 1.0
  assert_same_bits(
    weights(back), {k: v for k, v in weights(source).items() if not k.startswith("vae/")}
  )


def test_one_file_of_sats_becomes_its_part_of_a_folder(model, tmp_path):
  there = run(model, tmp_path / "there", "sat")
  file = shutil.copy(there / sat_release.TRANSFORMER_FILE, tmp_path / "transformer.pt")
  back = run(file, tmp_path / "back", "diffusers")
  assert [path.name for path in back.iterdir() if path.is_dir()] == ["transformer"]
  expected = {k: v for k, v in weights(model).items() if k.startswith("transformer/")}
  assert_same_bits(weights(back), expected)


def test_weights_in_another_type(model, tmp_path):
  there = run(model, tmp_path / "there", "diffusers", dtype="bfloat16")
  expected = {name: x.astype(ml_dtypes.bfloat16) for name, x in weights(model).items()}
  assert_same_bits(weights(there), expected)


def test_parts_alone_are_converted(model, tmp_path):
  shutil.copytree(model / "transformer", tmp_path / "partial" / "transformer")
  there = run(tmp_path / "partial", tmp_path / "there", "orbax")
  assert open_model(there).transformer()[0] == DIT_CONFIG
  expected = {k: v for k, v in weights(model).items() if k.startswith("transformer/")}
  assert_same_bits(weights(run(there, tmp_path / "back", "diffusers")), expected)


def test_a_training_run_is_written_with_the_average_of_its_weights(finished_run, tmp_path):
  config = make_config(finished_run.inputs)
  for weights_flag, tree in (("ema", "ema"), ("raw", "params")):
    there = run(finished_run.workdir, tmp_path / tree, "diffusers", weights=weights_flag)
    _, found = open_model(there).transformer()
    stored = checkpoint.load_weights(finished_run.workdir, weights_flag)
    assert_same_bits(tensors.flatten(found), tensors.flatten(stored))
  assert open_model(there).settings().text_drop == config.text.drop
  assert open_model(there).scheduler() == config.noise
  assert "raw weights" in (there / "README.md").read_text()
  assert len(Pipeline.from_pretrained(there)("a ball", **CALL).frames) == 1


def test_the_card_says_source_licence_and_true_digests(model, tmp_path):
  source = shutil.copytree(model, tmp_path / "named")
  (source / "README.md").write_text("---\nlicense: mit\n---\nhello\n")
  (source / "LICENSE").write_text("the text")
  there = epath.Path(run(source, tmp_path / "there", "orbax"))
  text = (there / "README.md").read_text()
  assert "from `named`" in text
  assert text.startswith("---\nlicense: mit\n")
  assert (there / "LICENSE").read_text() == "the text"
  files = [file for file in digests.files_in(there) if file.name != "README.md"]
  for file, digest in zip(files, digests.hash_files(files), strict=True):
    assert f"| `{file.relative_to(there).as_posix()}` | `{digest}` |" in text


def test_damage_of_an_orbax_folder_is_found_and_named(model, tmp_path):
  there = run(model, tmp_path / "there", "orbax")
  state = there / "vae" / "orbax" / "state"  # Files of arrays; digests.json guards itself.
  file = max(state.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  with pytest.raises(UserError, match=f"{file.name} is damaged"):
    open_model(there).vae()


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (lambda params: params["blocks"].pop("mlp"), "missing: blocks/mlp/down/bias"),
    (lambda params: params.update(more=np.zeros(2)), "not known: more"),
    (lambda params: params["out"].update(bias=np.zeros(3)), "out/bias has shape"),
  ],
)
def test_orbax_arrays_of_another_model_are_named(spoil, message, tmp_path):
  config, params = draw(DiT, DIT_CONFIG)
  spoil(params)
  orbax.write_weights(epath.Path(tmp_path), params)
  with pytest.raises(UserError, match=message):
    orbax.open_weights(TRANSFORMER, epath.Path(tmp_path), config)


def test_a_target_that_is_there_is_not_touched(model, tmp_path):
  (tmp_path / "there").mkdir()
  (tmp_path / "there" / "mine").write_text("x")
  with pytest.raises(UserError, match="is there already"):
    run(model, tmp_path / "there", "orbax")
  assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine"]


def test_nothing_is_left_under_the_targets_name_by_a_run_that_fails(model, tmp_path):
  source = shutil.copytree(model, tmp_path / "source")
  (source / "text_encoder" / "model.safetensors").write_bytes(b"\x00" * 99)
  with pytest.raises(UserError, match="is damaged"):
    run(source, tmp_path / "there", "orbax")
  assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("layout", ["diffusers", "orbax"])
@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_not_converted(model, tmp_path, layout, dtype, bad):
  source = shutil.copytree(model, tmp_path / "source")
  file = source / "vae" / "diffusion_pytorch_model.safetensors"
  stored = load_file(file)
  stored["encoder.conv_out.conv.bias"][3] = bad
  save_file(stored, file)
  with pytest.raises(
    UserError, match=r"parameter vae/encoder/conv_out/bias holds numbers that are"
  ):
    run(source, tmp_path / "there", layout, dtype=dtype)
  assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
  ("source", "layout", "message"),
  [
    ("empty", "orbax", "holds none of transformer, vae, text_encoder"),
    ("absent", "orbax", "There is no model at"),
  ],
)
def test_mistakes_are_explained(source, layout, message, tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError, match=message):
    run(tmp_path / source, tmp_path / "there", layout)


def test_an_image_model_is_opened_by_its_pipeline(tmp_path):
  source = next(path for path in PIPELINES if path.name.startswith("i2v_15"))
  there = run(source, tmp_path / "there", "orbax")
  assert ImageToVideo.from_pretrained(there).config.ofs_width > 0
