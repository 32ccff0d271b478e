"""Names of LoRA tensors: those of every trainer are read, and what is no plain LoRA is refused."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from cogvideox_jax.conversion import lora, lora_names
from cogvideox_jax.conversion.lora_names import Part
from cogvideox_jax.errors import UserError

RANK, WIDTH = 2, 8
MODULES = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_out.0")
INNER = "transformer_blocks.1.attn1.to_out.0"
UNDERSCORED = "transformer_blocks_1_attn1_to_out_0"


def drawn(part: str) -> np.ndarray:
  shape = (RANK, WIDTH) if part == "A" else (WIDTH, RANK)
  return np.random.default_rng(ord(part)).normal(size=shape).astype(np.float32)


def write(path, named, metadata=None):
  """A file of the named tensors; the default of a name's tensor is its matrix of MODULES[1]."""
  save_file(named, path, metadata=metadata)
  return path


@pytest.mark.parametrize(
  ("a", "b"),
  [
    (f"transformer.{INNER}.lora_A.weight", f"transformer.{INNER}.lora_B.weight"),
    (f"{INNER}.lora_A.weight", f"{INNER}.lora_B.weight"),
    (f"base_model.model.{INNER}.lora_A.weight", f"base_model.model.{INNER}.lora_B.weight"),
    (f"diffusion_model.{INNER}.lora_A.weight", f"diffusion_model.{INNER}.lora_B.weight"),
    (f"diffusion_model.{INNER}.lora_down.weight", f"diffusion_model.{INNER}.lora_up.weight"),
    (f"transformer.{INNER}.lora_A.default.weight", f"transformer.{INNER}.lora_B.default.weight"),
    (f"module.transformer.{INNER}.lora.down.weight", f"module.transformer.{INNER}.lora.up.weight"),
    (f"lora_unet__{UNDERSCORED}.lora_down.weight", f"lora_unet__{UNDERSCORED}.lora_up.weight"),
    (f"lora_unet_{UNDERSCORED}.lora_A.weight", f"lora_unet_{UNDERSCORED}.lora_B.weight"),
    (f"lora_transformer_{UNDERSCORED}.lora_down.weight", f"{INNER}.lora_B.weight"),
    (
      "model.diffusion_model.transformer.layers.1.attention.dense.matrix_A.0",
      "model.diffusion_model.transformer.layers.1.attention.dense.matrix_B.0",
    ),
  ],
)
def test_the_names_of_every_trainer_are_read(tmp_path, a, b):
  path = write(tmp_path / "a.safetensors", {a: drawn("A"), b: drawn("B")})
  found = lora.read(path, alpha=1.0)
  assert list(found) == [INNER]
  np.testing.assert_array_equal(found[INNER].a, drawn("A"))
  np.testing.assert_array_equal(found[INNER].b, drawn("B"))
  assert found[INNER].scale == 1 / RANK


def test_kohyas_names_lead_to_every_module_that_a_transformer_has():
  modules = [
    "patch_embed.proj",
    "patch_embed.text_proj",
    "norm_out.linear",
    "proj_out",
    "transformer_blocks.41.norm1.linear",
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.ff.net.2",
  ]
  names = [f"lora_unet__{module.replace('.', '_')}.lora_up.weight" for module in modules]
  parts, others = lora_names.find_parts(names, "a file")
  assert set(parts) == {Part(module, "lora_B") for module in modules}
  assert not others


@pytest.mark.parametrize(
  ("older", "part"),
  [
    ("attn1.processor.to_q_lora.down", Part("attn1.to_q", "lora_A")),
    ("attn1.processor.to_out_lora.up", Part("attn1.to_out.0", "lora_B")),
    ("attn1.to_v.lora.down", Part("attn1.to_v", "lora_A")),
    ("attn1.to_k.lora_linear_layer.up", Part("attn1.to_k", "lora_B")),
  ],
)
def test_names_of_before_peft_are_known(older, part):
  name = f"transformer.transformer_blocks.0.{older}.weight"
  (found,), _ = lora_names.find_parts([name], "a file")
  assert found == Part(f"transformer_blocks.0.{part.module}", part.part)


def test_tensors_of_other_networks_are_passed_over_with_a_warning(tmp_path):
  named = {"text_encoder.q.lora_A.weight": drawn("A"), "lora_te_q.lora_down.weight": drawn("A")}
  ours = {f"{INNER}.lora_{part}.weight": drawn(part) for part in "AB"}
  with pytest.warns(UserWarning, match="2 tensors belong to other networks"):
    assert set(lora.read(write(tmp_path / "a.safetensors", {**named, **ours}))) == {INNER}
  with (
    pytest.warns(UserWarning, match="2 tensors belong to other networks"),
    pytest.raises(UserError, match="changes nothing of a transformer"),
  ):
    lora.read(write(tmp_path / "b.safetensors", named))


@pytest.mark.parametrize(
  ("more", "message"),
  [
    ("transformer.proj_out.weight", "not a LoRA file: it has transformer.proj_out.weight"),
    ("transformer.proj_out.lora_A.weight", r"lacks transformer\.proj_out\.lora_B\.weight"),
    (f"transformer.{INNER}.alpha", r"alpha of .*to_out\.0 has shape \[2, 8\]"),
    (f"transformer.{INNER}.lora_C.weight", r"has transformer\..*\.lora_C\.weight, which is not"),
    (f"{INNER}.lora_C.weight", r"has transformer_blocks\..*\.lora_C\.weight, which is not"),
    ("transformer.proj_out.lora_mid.weight", "a LoCon with a Tucker decomposition"),
    ("transformer.proj_out.dora_scale", "is a DoRA"),
    (f"transformer.{INNER}.lora_magnitude_vector", "is a DoRA"),
    (f"lora_unet__{UNDERSCORED}.hada_w1_a", "is a LoHa"),
    (f"lora_unet__{UNDERSCORED}.lokr_w1", "is a LoKr"),
    (f"transformer.{INNER}.lora_B.bias", "a LoRA with biases"),
    (f"diffusion_model.{INNER}.diff", "a full difference of a weight"),
    (f"{INNER}.lora_A.weight", "several adapters"),
    (f"transformer.{INNER}.lora_A.other.weight", "several adapters"),
  ],
)
def test_what_is_no_plain_lora_is_refused_by_its_true_reason(tmp_path, more, message):
  named = {f"transformer.{INNER}.lora_{part}.weight": drawn(part) for part in "AB"}
  with pytest.raises(UserError, match=message):
    lora.read(write(tmp_path / "a.safetensors", {**named, more: drawn("A")}))


def test_matrices_of_no_rank_are_refused(tmp_path):
  named = {
    f"transformer.{INNER}.lora_A.weight": np.zeros((0, 8), np.float32),
    f"transformer.{INNER}.lora_B.weight": np.zeros((WIDTH, 0), np.float32),
  }
  with pytest.raises(UserError, match=rf"matrices of {INNER} hold no number: they change nothing"):
    lora.read(write(tmp_path / "a.safetensors", named))


def test_matrices_of_unequal_ranks_are_refused_by_their_module(tmp_path):
  named = {
    f"transformer.{INNER}.lora_A.weight": drawn("A"),
    f"transformer.{INNER}.lora_B.weight": np.zeros((WIDTH, RANK + 1), np.float32),
  }
  with pytest.raises(UserError, match=rf"the matrices of {INNER} do not fit: A is \[2, 8\]"):
    lora.read(write(tmp_path / "a.safetensors", named))


@pytest.mark.parametrize(
  "name", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors", "mine.safetensors"]
)
def test_a_folder_stands_for_the_file_in_it(tmp_path, name):
  named = {f"transformer.{INNER}.lora_{part}.weight": drawn(part) for part in "AB"}
  write(tmp_path / name, named)
  assert set(lora.read(tmp_path)) == set(lora.read(tmp_path, weight_name=name)) == {INNER}


def test_a_folder_of_several_files_is_refused_unless_one_is_named(tmp_path):
  named = {f"transformer.{INNER}.lora_{part}.weight": drawn(part) for part in "AB"}
  write(tmp_path / "a.safetensors", named)
  write(tmp_path / "b.safetensors", named)
  with pytest.raises(UserError, match=r"several files \(a.safetensors, b.safetensors\)"):
    lora.read(tmp_path)
  assert set(lora.read(tmp_path, weight_name="b.safetensors")) == {INNER}
  with pytest.raises(UserError, match=r"no LoRA file at .*c.safetensors"):
    lora.read(tmp_path, weight_name="c.safetensors")
