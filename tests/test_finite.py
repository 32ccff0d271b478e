"""Numbers that are not finite end in a message that names them, and never in a video."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from drawn import DIT_CONFIG, NOISE, draw, make_pipeline

from cogvideox_jax.conversion import component_fields, lora, model_contents, numbers, tensors
from cogvideox_jax.conversion.model_contents import Network
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit import DiT

CALL = {"num_inference_steps": 1, "num_frames": 1, "output_type": "latent"}
TYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
MODULE = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def pipe():
  return make_pipeline()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_number_of_every_type_is_looked_at(dtype, bad, monkeypatch):
  monkeypatch.setattr(numbers, "_AT_ONCE", 4)
  array = np.array([[-1.0, 0.0, 1e-8], [3.0, 6e4, -6e4]], dtype)
  assert numbers.is_finite(array)
  for index in np.ndindex(array.shape):
    spoilt = array.copy()
    spoilt[index] = bad
    assert not numbers.is_finite(spoilt)
  assert numbers.is_finite(np.array([], dtype))
  assert numbers.is_finite(np.arange(3))


def test_a_parameter_that_is_not_finite_is_named():
  config, params = draw(DiT, DIT_CONFIG)
  params["blocks"]["mlp"]["up"]["kernel"][1, 2, 3] = np.nan
  with pytest.raises(UserError, match="The parameter blocks/mlp/up/kernel holds numbers that"):
    make_pipeline((config, params))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"latents": np.full((1, 1, 4, 6, 4), np.nan, np.float32)}, "latents has numbers that are not"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
    (
      {"latents": np.full((1, 1, 4, 6, 4), 3e38, np.float32)},
      "The result of denoising has numbers that are not finite",
    ),
    (
      {"prompt": None, "prompt_embeds": np.full((1, 6, 8), np.inf, np.float32)},
      "prompt_embeds or negative_prompt_embeds has numbers",
    ),
  ],
)
def test_an_argument_that_is_not_finite_is_named(pipe, changes, message):
  with pytest.raises(UserError, match=message):
    pipe(**{"prompt": "a circle", **CALL, **changes})


def test_a_video_that_is_not_finite_is_not_shown_as_a_black_one():
  pipe = make_pipeline()
  params = pipe._frame_coder.params
  pipe._frame_coder.params = {
    **params,
    "decoder": {**params["decoder"], "conv_out": {**params["decoder"]["conv_out"]}},
  }
  bias = pipe._frame_coder.params["decoder"]["conv_out"]
  bias["bias"] = bias["bias"].at[0].set(np.inf)
  with pytest.raises(UserError, match="The decoded video has numbers that are not finite"):
    pipe("a circle", **{**CALL, "output_type": "uint8"})


@pytest.mark.parametrize("spoilt", ["a", "b", "scale"])
def test_a_lora_that_is_not_finite_is_named(tmp_path, spoilt):
  update = lora.Update(np.ones((2, 8), np.float32), np.ones((8, 2), np.float32), 1.0)
  value = np.nan if spoilt == "scale" else np.full_like(getattr(update, spoilt), np.nan)
  lora.write(tmp_path / "a.safetensors", {MODULE: update._replace(**{spoilt: value})})
  with pytest.raises(UserError, match=f"the update of {MODULE} holds numbers that are not finite"):
    lora.read(tmp_path / "a.safetensors")


def test_a_weight_of_an_adapter_must_be_finite(pipe):
  width = DIT_CONFIG.width
  update = lora.Update(np.ones((2, width), np.float32), np.ones((width, 2), np.float32), 1.0)
  with pytest.raises(UserError, match="The weight of the adapter 'x' is nan"):
    pipe.add_lora({MODULE: update}, "x", float("nan"))


def test_an_overflow_of_a_cast_is_said():
  config, params = draw(DiT, DIT_CONFIG)
  params["blocks"]["mlp"]["up"]["kernel"][1, 2, 3] = 1e5
  network = Network("transformer", config, params, None)
  with pytest.raises(UserError, match=r"blocks/mlp/up/kernel has numbers up to 1e\+05, which over"):
    tensors.materialize(model_contents.cast(network, np.dtype(np.float16)))
  tensors.materialize(model_contents.cast(network, np.dtype(ml_dtypes.bfloat16)))


def test_the_type_of_a_lora_changes_too():
  update = lora.Update(np.ones((2, 8), np.float32), np.ones((8, 2), np.float32), 0.5)
  found = lora.cast({MODULE: update}, np.dtype(ml_dtypes.bfloat16))[MODULE]
  assert (found.a.dtype, found.b.dtype, found.scale) == (ml_dtypes.bfloat16,) * 2 + (0.5,)
  large = update._replace(b=update.b * 1e5)
  with pytest.raises(UserError, match=f"B of {MODULE} has numbers up to"):
    lora.cast({MODULE: large}, np.dtype(np.float16))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"_class_name": "EulerDiscreteScheduler"}, "the scheduler is EulerDiscreteScheduler"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "which samples other models"),
    ({"beta_start": -1}, "no noise schedule"),
    ({"beta_start": 0.5}, "no noise schedule"),
    ({"beta_end": 1.5}, "no noise schedule"),
    ({"snr_shift_scale": 0}, "no noise schedule"),
    ({"num_train_timesteps": 0}, "no noise schedule"),
    ({"beta_start": None}, "beta_start is None; it must be a number"),
    ({"snr_shift_scale": float("nan")}, "snr_shift_scale is nan"),
  ],
)
def test_a_scheduler_that_is_none_of_cogvideox_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    component_fields.read_noise({**component_fields.write_noise(NOISE), **changes}, "a file")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_layers": None}, "num_layers is None; it must be a whole number"),
    ({"num_layers": -1}, "num_layers is -1"),
    ({"num_layers": 2.5}, "num_layers is 2.5"),
    ({"num_attention_heads": True}, "num_attention_heads is True"),
    ({"spatial_interpolation_scale": "2"}, "spatial_interpolation_scale is '2'; it must be a num"),
    ({"patch_size": None}, "patch_size is None"),
  ],
)
def test_a_field_of_another_type_is_refused_by_name(changes, message):
  fields = component_fields.write_transformer(dataclasses.replace(DIT_CONFIG))
  with pytest.raises(UserError, match=message):
    component_fields.read_transformer({**fields, **changes}, "a file")
