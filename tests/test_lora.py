"""LoRA files: what of them is used, what is refused, and that adapters leave the base as it was."""

import json

import jax
import numpy as np
import pytest
import torch
from drawn import DIT_CONFIG, draw, make_pipeline
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

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


def test_a_saved_lora_has_the_same_effect(tmp_path):
  stored = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 8})
  updates = lora.read(write(tmp_path / "a.safetensors", {"lora_adapter_metadata": stored}))
  lora.write(tmp_path / "b.safetensors", updates)
  again = lora.read(tmp_path / "b.safetensors")
  for module in MODULES:
    a, b, scale = updates[module]
    np.testing.assert_allclose(again[module].b @ again[module].a, scale * b @ a, rtol=1e-6)


def test_a_module_or_a_shape_that_the_transformer_lacks_is_named(tmp_path):
  config, params = draw(DiT, DIT_CONFIG)
  update = lora.Update(np.zeros((2, 7), np.float32), np.zeros((WIDTH, 2), np.float32), 1.0)
  with pytest.raises(UserError, match="to_q has shape"):
    lora.fuse(params, config, {MODULES[0]: update})
  with pytest.raises(UserError, match=r"changes transformer_blocks.9.attn1.to_q"):
    lora.fuse(params, config, {"transformer_blocks.9.attn1.to_q": update})


def test_the_update_of_a_convolution_is_added_and_written_with_its_shapes(tmp_path):
  config, params = draw(DiT, DIT_CONFIG)
  rng = np.random.default_rng(0)
  a = rng.normal(size=(RANK, config.in_channels, 2, 2)).astype(np.float32)
  b = rng.normal(size=(WIDTH, RANK, 1, 1)).astype(np.float32)
  names = [f"transformer.patch_embed.proj.lora_{part}.weight" for part in "AB"]
  save_file(dict(zip(names, (a, b), strict=True)), tmp_path / "a.safetensors")
  updates = lora.read(tmp_path / "a.safetensors")
  fused = tensors.materialize(lora.fuse(params, config, updates))
  change = np.einsum("or,rcij->cijo", b[..., 0, 0], a).reshape(-1, WIDTH)
  expected = params["vision_in"]["kernel"] + change
  np.testing.assert_allclose(fused["vision_in"]["kernel"], expected, atol=1e-5)
  lora.write(tmp_path / "b.safetensors", updates)
  for name, tensor in load_file(tmp_path / "b.safetensors").items():
    np.testing.assert_array_equal(tensor, load_file(tmp_path / "a.safetensors")[name])


def test_eight_bit_floats_are_read_as_they_are(tmp_path):
  stored = {name: torch.from_numpy(x) for name, x in load_file(write(tmp_path / "a")).items()}
  for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
    halves = {name: x.to(kind) for name, x in stored.items()}
    save_torch_file(halves, tmp_path / "b.safetensors")
    updates = lora.read(tmp_path / "b.safetensors")
    for module in MODULES:
      for part, found in (("A", updates[module].a), ("B", updates[module].b)):
        expected = halves[f"transformer.{module}.lora_{part}.weight"].float().numpy()
        np.testing.assert_array_equal(found.astype(np.float32), expected)


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
