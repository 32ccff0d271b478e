"""The verb `convert` on LoRAs: into the weights, and from one layout into another."""

from pathlib import Path

import numpy as np
import pytest
from converted import assert_same_bits, run, weights
from drawn import DIT_CONFIG
from model_folder import make_model
from safetensors.numpy import load_file, save_file

from cogvideox_jax.conversion import lora
from cogvideox_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("forked_torch")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
  return make_model(tmp_path_factory.mktemp("model"))


def make_lora(path: Path) -> Path:
  rng = np.random.default_rng(1)
  width = DIT_CONFIG.width
  stored = {}
  for module in ("transformer_blocks.0.attn1.to_k", "transformer_blocks.1.attn1.to_out.0"):
    stored[f"transformer.{module}.lora_A.weight"] = rng.normal(size=(2, width))
    stored[f"transformer.{module}.lora_B.weight"] = rng.normal(size=(width, 2))
  save_file({name: x.astype(np.float32) for name, x in stored.items()}, path)
  return path


@pytest.mark.parametrize(
  "source_layout", ["diffusers", pytest.param("orbax", marks=pytest.mark.slow)]
)
def test_a_lora_becomes_part_of_the_weights(model, tmp_path, source_layout):
  path = make_lora(tmp_path / "lora.safetensors")
  source = run(model, tmp_path / "source", source_layout)
  there = run(source, tmp_path / "there", "diffusers", lora=str(path), lora_weight=0.5)
  base, stored, changed = weights(model), load_file(path), weights(there)
  for name, tensor in base.items():
    module = name.removesuffix(".weight").replace("transformer/", "transformer.", 1)
    if f"{module}.lora_A.weight" in stored:
      a, b = stored[f"{module}.lora_A.weight"], stored[f"{module}.lora_B.weight"]
      np.testing.assert_allclose(changed[name], tensor + 0.5 * b @ a, atol=1e-5)
    else:
      np.testing.assert_array_equal(changed[name], tensor)
  assert "LoRA `lora.safetensors` at weight 0.5" in (there / "README.md").read_text()


def test_a_lora_passes_into_sats_names_and_back(tmp_path):
  path = make_lora(tmp_path / "lora.safetensors")
  there = run(path, tmp_path / "there", "sat")
  with pytest.warns(UserWarning, match="Taken at scale 1"):
    back = run(there / lora.SAT_FILE, tmp_path / "back", "diffusers")
  assert_same_bits(load_file(back / lora.FILE), load_file(path))


def test_a_lora_of_sat_is_not_added_before_its_scale_is_said(model, tmp_path):
  file = run(make_lora(tmp_path / "lora.safetensors"), tmp_path / "sat", "sat") / lora.SAT_FILE
  with pytest.raises(UserError, match=r"alpha / 2\.\nGive --lora_alpha=ALPHA"):
    run(model, tmp_path / "there", "diffusers", lora=str(file))
  assert not (tmp_path / "there").exists()
  there = run(model, tmp_path / "there", "diffusers", lora=str(file), lora_alpha=1.0)
  same = run(
    model, tmp_path / "same", "diffusers", lora=str(tmp_path / "lora.safetensors"), lora_weight=0.5
  )
  assert_same_bits(weights(there), weights(same))
  assert "LoRA `lora.pt` at weight 1, alpha 1." in (there / "README.md").read_text()


@pytest.mark.parametrize("layout", ["diffusers", "sat"])
def test_a_lora_appears_whole_or_not_at_all(tmp_path, monkeypatch, layout):
  seen = []

  def fail(path, *_):
    path.write_bytes(b"half")
    seen.append(path)
    raise OSError("no space left")

  for name in ("write", "write_sat"):
    monkeypatch.setattr(lora, name, fail)
  (tmp_path / "out").mkdir()
  path = make_lora(tmp_path / "lora.safetensors")
  with pytest.raises(OSError, match="no space left"):
    run(path, tmp_path / "out" / "there", layout)
  (half,) = seen
  assert half.parent.parent.parent == tmp_path / "out"  # On the target's disk.
  assert list((tmp_path / "out").iterdir()) == []


def test_arrays_of_orbax_hold_no_lora(tmp_path):
  path = make_lora(tmp_path / "lora.safetensors")
  with pytest.raises(UserError, match="give --format=diffusers or sat"):
    run(path, tmp_path / "there", "orbax")
