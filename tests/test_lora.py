"""LoRA files: what of them is used, what is refused, and that adapters leave the base as it was."""

import json

import jax
import numpy as np
import pytest
from drawn import DIT_CONFIG, draw, make_pipeline
from safetensors.numpy import load_file, save_file

from cogvideox_jax.conversion import lora, tensors
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit import DiT

WIDTH, RANK = DIT_CONFIG.width, 2
MODULES = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_out.0")
QUICK = {"num_inference_steps": 2, "output_type": "latent"}


def write(path, metadata=None, seed=0, **more):
  rng = np.random.default_rng(seed)
  tensors = dict(more)
  for module in MODULES:
    a, b = rng.normal(size=(RANK, WIDTH)), rng.normal(size=(WIDTH, RANK))
    tensors[f"transformer.{module}.lora_A.weight"] = a.astype(np.float32)
    tensors[f"transformer.{module}.lora_B.weight"] = b.astype(np.float32)
  save_file(tensors, path, metadata=metadata)
  return path


def test_only_the_named_weights_change_by_the_product(tmp_path):
  config, params = draw(DiT, DIT_CONFIG)
  updates = lora.read(write(tmp_path / "a.safetensors"))
  fused = tensors.materialize(lora.fuse(params, config, updates, weight=0.5))
  a, b, scale = updates[MODULES[0]]
  assert scale == 1.0
  difference = (
    fused["blocks"]["attention"]["query"]["kernel"]
    - (params["blocks"]["attention"]["query"]["kernel"])
  )
  expected = (0.5 * b @ a).T
  np.testing.assert_allclose(difference[0], expected, atol=1e-5)
  np.testing.assert_array_equal(difference[1], 0)
  same = jax.tree.map(np.array_equal, fused, params)
  changed = [path for path, equal in jax.tree_util.tree_leaves_with_path(same) if not equal]
  assert len(changed) == 2


@pytest.mark.parametrize(
  ("fields", "scale"),
  [
    ({}, 1.0),
    ({"r": 2, "lora_alpha": 8}, 4.0),
    ({"r": 2, "lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
    ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"to_q": 2}}, 1.0),
  ],
)
def test_the_header_says_the_scale(tmp_path, fields, scale):
  stored = json.dumps({f"transformer.{name}": value for name, value in fields.items()})
  path = write(tmp_path / "a.safetensors", {"lora_adapter_metadata": stored} if fields else None)
  assert lora.read(path)[MODULES[0]].scale == pytest.approx(scale)


def test_a_saved_lora_has_the_same_effect(tmp_path):
  stored = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 8})
  updates = lora.read(write(tmp_path / "a.safetensors", {"lora_adapter_metadata": stored}))
  lora.write(tmp_path / "b.safetensors", updates)
  again = lora.read(tmp_path / "b.safetensors")
  for module in MODULES:
    a, b, scale = updates[module]
    np.testing.assert_allclose(again[module].b @ again[module].a, scale * b @ a, rtol=1e-6)


ZEROS = np.zeros((2, 2), np.float32)


@pytest.mark.parametrize(
  ("more", "message"),
  [
    ({"transformer.proj_out.alpha": ZEROS}, "not a LoRA file: it has transformer.proj_out.alpha"),
    ({"transformer.proj_out.lora_A.weight": ZEROS}, "lacks transformer.proj_out.lora_B.weight"),
    ({"transformer.proj_out.lora_mid.weight": ZEROS}, "lacks transformer.proj_out.lora_A"),
  ],
)
def test_what_is_no_lora_is_refused_by_name(tmp_path, more, message):
  with pytest.raises(UserError, match=message):
    lora.read(write(tmp_path / "a.safetensors", **more))


def test_keys_of_other_networks_are_passed_over_with_a_warning(tmp_path):
  path = write(tmp_path / "a.safetensors", **{"text_encoder.q.lora_A.weight": ZEROS})
  with pytest.warns(UserWarning, match="1 tensors do not begin with"):
    assert set(lora.read(path)) == set(MODULES)
  tensors = {name.removeprefix("transformer."): x for name, x in load_file(path).items()}
  save_file(tensors, path)
  with (
    pytest.warns(UserWarning, match="do not begin with"),
    pytest.raises(UserError, match="changes nothing"),
  ):
    lora.read(path)


def test_a_module_or_a_shape_that_the_transformer_lacks_is_named(tmp_path):
  config, params = draw(DiT, DIT_CONFIG)
  update = lora.Update(np.zeros((2, 7), np.float32), np.zeros((WIDTH, 2), np.float32), 1.0)
  with pytest.raises(UserError, match="to_q has shape"):
    lora.fuse(params, config, {MODULES[0]: update})
  with pytest.raises(UserError, match=r"changes transformer_blocks.9.attn1.to_q"):
    lora.fuse(params, config, {"transformer_blocks.9.attn1.to_q": update})


def test_adapters_come_and_go_and_leave_the_base_as_it_was(tmp_path):
  pipe = make_pipeline()
  base = pipe("a circle", **QUICK).frames
  pipe.load_lora_weights(write(tmp_path / "a.safetensors"), "a")
  one = pipe("a circle", **QUICK).frames
  assert np.abs(one - base).max() > 1e-2
  pipe.load_lora_weights(write(tmp_path / "b.safetensors", seed=1), "b")
  assert np.abs(pipe("a circle", **QUICK).frames - one).max() > 1e-2
  pipe.set_adapters(["a"])
  np.testing.assert_allclose(pipe("a circle", **QUICK).frames, one, atol=1e-5)
  pipe.set_adapters(["a", "b"], 0.0)
  np.testing.assert_allclose(pipe("a circle", **QUICK).frames, base, atol=1e-5)
  pipe.unload_lora_weights()
  np.testing.assert_array_equal(pipe("a circle", **QUICK).frames, base)
  pipe.load_lora_weights(tmp_path / "a.safetensors")
  pipe.fuse_lora()
  pipe.unload_lora_weights()
  np.testing.assert_allclose(pipe("a circle", **QUICK).frames, one, atol=1e-5)
  with pytest.raises(UserError, match="no adapter 'c'"):
    pipe.set_adapters(["c"])


def test_a_call_may_scale_all_adapters(tmp_path):
  pipe = make_pipeline()
  base = pipe("a circle", **QUICK).frames
  pipe.load_lora_weights(write(tmp_path / "a.safetensors"))
  whole = pipe("a circle", **QUICK).frames
  none = pipe("a circle", attention_kwargs={"scale": 0.0}, **QUICK).frames
  half = pipe("a circle", attention_kwargs={"scale": 0.5}, **QUICK).frames
  np.testing.assert_array_equal(none, base)
  np.testing.assert_array_equal(pipe("a circle", **QUICK).frames, whole)
  pipe.set_adapters(["default"], 0.5)
  np.testing.assert_array_equal(pipe("a circle", **QUICK).frames, half)


OLDER = {
  "attn1.processor.to_q_lora.down.weight": "attn1.to_q.lora_A.weight",
  "attn1.processor.to_out_lora.up.weight": "attn1.to_out.0.lora_B.weight",
  "attn1.to_v.lora.down.weight": "attn1.to_v.lora_A.weight",
  "attn1.to_k.lora_linear_layer.up.weight": "attn1.to_k.lora_B.weight",
}


@pytest.mark.parametrize(("older", "name"), OLDER.items())
def test_names_of_before_peft_are_known(older, name):
  assert lora._today(f"transformer.transformer_blocks.0.{older}") == (
    f"transformer.transformer_blocks.0.{name}"
  )
