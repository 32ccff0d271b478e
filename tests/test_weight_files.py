"""Files of weights as people have them: read, or named with the way out."""

import gc
import json
import random
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from drawn import DIT_CONFIG, draw
from etils import epath
from safetensors.torch import load_file, save_file

from cogvideox_jax.conversion import diffusers, sat, sat_release, torch_files
from cogvideox_jax.conversion.components import TRANSFORMER
from cogvideox_jax.conversion.folder import ModelFolder
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit import DiT

PT = "mp_rank_00_model_states.pt"
STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("model") / "transformer"
  diffusers.save_transformer(folder, *draw(DiT, DIT_CONFIG))
  return folder


@pytest.fixture(scope="module")
def of_sat() -> dict[str, torch.Tensor]:
  """The tensors of a transformer by SAT's names."""
  config, params = draw(DiT, DIT_CONFIG)
  named = sat.as_file(params, TRANSFORMER, config)
  return {name: torch.from_numpy(np.array(x)) for name, x in named.items()}


def check_read(folder) -> None:
  _, expected = draw(DiT, DIT_CONFIG)
  jax.tree.map(np.testing.assert_array_equal, diffusers.load_transformer(folder)[1], expected)


def trained(of_sat) -> dict:
  """What SAT's trainer saves: the weights, its counters, and the states of random generators."""
  return {
    "module": of_sat,
    "iteration": 500,
    "random_rng_state": random.getstate(),
    "np_rng_state": np.random.get_state(),
    "torch_rng_state": torch.get_rng_state(),
    "loss": np.float64(0.5),
    "client_lr_scheduler": {"warmup_iter": 100.0},
  }


@pytest.mark.usefixtures("forked_torch")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_of_sats_training_is_read(tmp_path, of_sat, legacy):
  torch.save(trained(of_sat), tmp_path / PT, _use_new_zipfile_serialization=not legacy)
  _, expected = draw(DiT, DIT_CONFIG)
  found = sat.load_transformer(tmp_path / PT, DIT_CONFIG)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


class Thing:
  pass


@pytest.mark.usefixtures("forked_torch")
@pytest.mark.parametrize(
  ("content", "message"),
  [
    (lambda: {"module": {"x": torch.zeros(2)}, "args": Thing()}, r"an object, \S+\.Thing, that"),
    (lambda: b"\x80\x02 no file of torch's", "damaged or no file of torch's"),
  ],
)  # fmt: skip
def test_what_torchs_restricted_loader_refuses_is_named(tmp_path, content, message):
  if isinstance(stored := content(), bytes):
    (tmp_path / "a.pt").write_bytes(stored)
  else:
    torch.save(stored, tmp_path / "a.pt")
  with pytest.raises(UserError, match=message), torch_files.opened(tmp_path / "a.pt"):
    pass


@pytest.mark.parametrize("latest", [False, True])
def test_a_folder_of_sats_training_stands_for_its_checkpoint(tmp_path, latest):
  for iteration in ("500", "1000") if latest else ("500",):
    (tmp_path / iteration).mkdir()
    (tmp_path / iteration / PT).write_bytes(b"")
  if latest:
    (tmp_path / "latest").write_text("500\n")
  path = epath.Path(tmp_path)
  assert sat_release.is_release(path)
  assert sat_release._torch_files(path) == {"transformer": path / "500" / PT}
  assert sat_release._torch_files(path / "500") == {"transformer": path / "500" / PT}


@pytest.mark.parametrize(
  ("files", "message"),
  [
    (["500/" + PT, "1000/" + PT], r"several checkpoints \(1000, 500\)"),
    (["500/" + PT, "500/mp_rank_01_model_states.pt"], "2 files of model-parallel ranks"),
    (["500/zero_pp_rank_0_mp_rank_00_model_states.pt"], "ZeRO-3 .*\n.*zero_to_fp32.py"),
    (["500/bf16_zero_pp_rank_1_mp_rank_00_model_states.pt"], "ZeRO-3 .*\n.*zero_to_fp32.py"),
  ],
)
def test_a_checkpoint_in_parts_is_refused_with_the_way_out(tmp_path, files, message):
  for name in files:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
  with pytest.raises(UserError, match=message):
    sat_release.is_release(epath.Path(tmp_path))


def test_a_model_with_a_lora_inside_says_how_to_give_it(tmp_path, of_sat):
  name = "model.diffusion_model.transformer.layers.0.attention.dense.matrix_A.0"
  save_file({**of_sat, name: torch.zeros(2, 8)}, tmp_path / "a.safetensors")
  with pytest.raises(
    UserError, match=r"a base model and a LoRA of SAT in one file.\nGive .* --lora"
  ):
    sat.load_transformer(tmp_path / "a.safetensors", DIT_CONFIG)


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_variants_and_shards_without_an_index_are_read(tmp_path, folder, variant, shards):
  there = shutil.copytree(folder, tmp_path / "transformer")
  file = there / f"{STEM}.safetensors"
  stored = load_file(file)
  file.unlink()
  if shards == 1:
    save_file(stored, there / f"{STEM}.{variant}.safetensors")
  else:
    for number in (1, 2):
      part = {name: x for i, (name, x) in enumerate(stored.items()) if i % 2 == number - 1}
      save_file(part, there / f"{STEM}-{number:05d}-of-00002.safetensors")
  check_read(there)
  if shards == 2:
    (there / f"{STEM}-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=f"no weights: {STEM}-00002-of-00002"):
      diffusers.load_transformer(there)


def test_weights_of_eight_bits_are_read_as_what_they_are(tmp_path, folder):
  there = shutil.copytree(folder, tmp_path / "transformer")
  stored = load_file(there / f"{STEM}.safetensors")
  small = {name: x.to(torch.float8_e4m3fn) for name, x in stored.items()}
  save_file(small, there / f"{STEM}.safetensors")
  _, params = diffusers.load_transformer(there)
  expected = small["proj_out.weight"].float().numpy().T
  np.testing.assert_array_equal(params["out"]["kernel"].astype(np.float32), expected)


@pytest.mark.parametrize("kind", ["tensor", "outputs", "outputs, 1"])
@pytest.mark.parametrize("end", [".scale_weight", ".weight_scale"])
def test_weights_of_eight_bits_with_a_scale_are_scale_times_value(tmp_path, folder, kind, end):
  there, rng = shutil.copytree(folder, tmp_path / "transformer"), np.random.default_rng(0)
  stored, expected = load_file(there / f"{STEM}.safetensors"), {}
  found = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
  for name, x in stored.items():
    found[name] = expected[name] = x
    if x.ndim == 2 and "attn1" in name:
      shape = {"tensor": (), "outputs": (len(x),), "outputs, 1": (len(x), 1)}[kind]
      scale = torch.from_numpy(np.asarray(rng.uniform(0.3, 0.9, shape), np.float32))
      found[name] = (x / scale.reshape(-1, 1)).to(torch.float8_e4m3fn)
      module = name.removesuffix(".weight")
      found |= {module + end: scale, f"{module}.input_scale": torch.ones(())}
      expected[name] = found[name].float() * scale.reshape(-1, 1)
  save_file(found, there / f"{STEM}.safetensors")
  save_file(expected, tmp_path / f"{STEM}.safetensors")
  shutil.copy(there / "config.json", tmp_path)
  _, params = diffusers.load_transformer(there)
  _, wanted = diffusers.load_transformer(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, wanted)


@pytest.mark.parametrize(
  ("end", "shape", "message"),
  [
    (".weight_scale_inv", (1, 1), r"weight_scale_inv: scales of blocks .*\n.*bfloat16"),
    (".weight_scale", (2,), r"has shape \[2\]: it must be one number, or one for each of the"),
    (".zero_point", (), r"not known: \S+\.zero_point"),
  ],
)
def test_other_scales_of_eight_bits_are_refused_by_name(tmp_path, folder, end, shape, message):
  there = shutil.copytree(folder, tmp_path / "transformer")
  stored = load_file(there / f"{STEM}.safetensors")
  small = {name: x.to(torch.float8_e4m3fn) for name, x in stored.items()}
  module = "transformer_blocks.0.attn1.to_q"
  save_file({**small, module + end: torch.ones(shape)}, there / f"{STEM}.safetensors")
  with pytest.raises(UserError, match=message):
    diffusers.load_transformer(there)


@pytest.mark.usefixtures("forked_torch")
@pytest.mark.parametrize("shards", [1, 2])
def test_weights_in_older_files_of_torch_are_read_by_its_restricted_loader(
  tmp_path, folder, shards
):
  there = shutil.copytree(folder, tmp_path / "transformer")
  stored = load_file(there / f"{STEM}.safetensors")
  (there / f"{STEM}.safetensors").unlink()
  if shards == 1:
    torch.save(stored, there / f"{STEM}.bin")
  else:
    weight_map = {}
    for number in range(2):
      part = {name: x for i, (name, x) in enumerate(stored.items()) if i % 2 == number}
      torch.save(part, there / f"{STEM}-{number}.bin")
      weight_map |= dict.fromkeys(part, f"{STEM}-{number}.bin")
    (there / f"{STEM}.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
  config, params = diffusers.load_transformer(there)
  _, expected = draw(DiT, DIT_CONFIG)
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  before = set(Path(tempfile.gettempdir()).glob("torch-*"))
  opened = diffusers.open_weights(TRANSFORMER, there, config)
  (copy,) = set(Path(tempfile.gettempdir()).glob("torch-*")) - before
  del opened, params
  gc.collect()
  assert not copy.exists()
  if shards == 2:
    (there / f"{STEM}-1.bin").unlink()
    with pytest.raises(UserError, match=f"names {STEM}-1.bin, which is not there"):
      diffusers.load_transformer(there)
  else:
    torch.save({"x": Thing()}, there / f"{STEM}.bin")
    with pytest.raises(UserError, match=r"an object, \S+\.Thing, that is no tensor"):
      diffusers.load_transformer(there)


def test_a_moving_average_alone_is_named(tmp_path, folder):
  shutil.copytree(folder, tmp_path / "transformer_ema")
  with pytest.raises(UserError, match=r"has transformer_ema/.*\nCopy or rename it to transformer/"):
    ModelFolder(epath.Path(tmp_path)).transformer()
