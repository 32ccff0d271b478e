"""Text to video on models of a few thousand drawn weights."""

import inspect
import pydoc
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import (
  CogVideoXImageToVideoPipeline,
  CogVideoXPipeline,
  CogVideoXVideoToVideoPipeline,
)
from drawn import DIT_CONFIG, NOISE, T5_CONFIG, VAE_CONFIG, draw, make_pipeline
from flax import nnx

from cogvideox_jax import sharding
from cogvideox_jax.conversion import diffusers, folder
from cogvideox_jax.conversion.folder import Settings
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference import noise_draws
from cogvideox_jax.inference.denoising import jit_step
from cogvideox_jax.inference.image_to_video import ImageToVideo
from cogvideox_jax.inference.noise_draws import INITIAL, draw_noise
from cogvideox_jax.inference.packed_rows import pack_videos
from cogvideox_jax.inference.pipeline import Pipeline
from cogvideox_jax.inference.progress import Progress
from cogvideox_jax.inference.step_sharding import shard_step
from cogvideox_jax.inference.video_to_video import VideoToVideo
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.t5 import T5Encoder
from cogvideox_jax.models.vae import VAE, decode

DENOISE_STEP = jit_step(jax.devices()[0])
QUICK = {"num_inference_steps": 3, "output_type": "latent"}
PROMPTS = ["a red circle", "a blue square", "a green star"]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
  return make_pipeline()


@pytest.fixture
def traces(monkeypatch) -> list[int]:
  """Rows of the network's batch, each time that it is traced."""
  rows, call = [], DiT.__call__

  def spy(self, vision, *args, **kwargs):
    rows.append(len(vision))
    return call(self, vision, *args, **kwargs)

  DENOISE_STEP.clear_cache()
  monkeypatch.setattr(DiT, "__call__", spy)
  return rows


def test_same_seed_same_video_and_another_seed_another(pipe):
  first, again, other = (pipe("a circle", seed=seed, **QUICK).frames for seed in (5, 5, 6))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 0.1


def test_drawn_noise_is_bit_equal_whatever_the_batch():
  seeds, indices = np.uint32([3, 2**32 - 1]), np.uint32([0, 1])
  together = draw_noise(seeds, indices, INITIAL, (3, 4, 6, 4))
  for i in range(2):
    alone = draw_noise(seeds[i : i + 1], indices[i : i + 1], INITIAL, (3, 4, 6, 4))
    np.testing.assert_array_equal(together[i], alone[0])
  assert np.abs(together - draw_noise(seeds, indices, INITIAL + 1, (3, 4, 6, 4))).max() > 0.1


def test_a_video_does_not_depend_on_what_else_is_in_the_call(pipe):
  call = {**QUICK, "num_videos_per_prompt": 3}
  together = pipe(PROMPTS, seed=[1, 2, 3], batch_size=2, **call).frames
  assert together.shape == (9, 3, 4, 6, 4)
  assert np.abs(together[0] - together[1]).max() > 0.1
  for i in (2, 0):
    alone = pipe(PROMPTS[i], seed=i + 1, batch_size=1, **call).frames
    np.testing.assert_allclose(together[3 * i : 3 * i + 3], alone, atol=1e-4)


def test_a_stochastic_solver_draws_new_noise_at_each_step_of_each_video(pipe, monkeypatch):
  draws = []

  def spy(seeds, indices, draw, shape):
    draws.append(draw)
    return draw_noise(seeds, indices, draw, shape)

  monkeypatch.setattr(noise_draws, "draw_noise", spy)
  together = pipe(PROMPTS[:2], seed=4, solver="dpm", **QUICK).frames
  assert draws == [INITIAL, 1, 2]  # The last step adds none.
  alone = pipe(PROMPTS[1], seed=4, solver="dpm", **QUICK).frames
  np.testing.assert_allclose(together[1:], alone, atol=1e-4)
  assert np.abs(alone - pipe(PROMPTS[1], seed=4, **QUICK).frames).max() > 0.1


def test_guidance_moves_from_the_negative_prompt_through_the_prompt(pipe):
  # One step from pure noise returns -v, so videos are linear in the guided v.
  call = {"num_inference_steps": 1, "output_type": "latent", "seed": 1}
  negative, positive = (pipe(p, guidance_scale=1.0, **call).frames for p in PROMPTS[:2])
  guided = pipe(PROMPTS[1], PROMPTS[0], guidance_scale=3.0, **call).frames
  np.testing.assert_allclose(guided, negative + 3 * (positive - negative), atol=1e-4)
  assert np.abs(positive - negative).max() > 1e-2


def test_without_guidance_the_negative_half_is_not_computed(pipe, traces):
  plain = pipe("a circle", guidance_scale=1.0, **QUICK).frames
  ignored = pipe("a circle", "a negative prompt", guidance_scale=1.0, **QUICK).frames
  np.testing.assert_array_equal(plain, ignored)
  pipe("a circle", guidance_scale=1.5, **QUICK)
  assert traces == [1, 2]


@pytest.mark.parametrize("text_drop", ["zeros", "empty"])
def test_the_default_negative_is_what_training_dropped_captions_to(text_drop):
  pipe = make_pipeline(settings=Settings(text_drop=text_drop))
  zeros = np.zeros((1, 6, 8), np.float32)
  given = {"negative_prompt_embeds": zeros} if text_drop == "zeros" else {"negative_prompt": ""}
  expected = pipe("a circle", **given, **QUICK).frames
  np.testing.assert_array_equal(pipe("a circle", **QUICK).frames, expected)
  assert np.abs(pipe("a circle", "a square", **QUICK).frames - expected).max() > 1e-2


def test_other_weights_steps_or_guidance_compile_nothing_anew(pipe, traces):
  latents = pipe("a circle", **QUICK).frames
  other = make_pipeline(draw(DiT, DIT_CONFIG, seed=1))
  others = [
    other("a circle", **QUICK).frames,
    pipe("a circle", **{**QUICK, "num_inference_steps": 5}).frames,
    pipe("a circle", guidance_scale=2.0, use_dynamic_cfg=True, solver="dpm", **QUICK).frames,
  ]
  assert len(traces) == 1
  assert all(np.abs(each - latents).max() > 1e-2 for each in others)


def test_weights_on_a_mesh_make_the_same_video_by_one_program(pipe):
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "context": 1, "tensor": 1})
  config, params = draw(DiT, DIT_CONFIG)
  shardings = sharding.shardings(params, mesh, sharding.rules_named("fsdp"))
  DENOISE_STEP.clear_cache()
  latents = make_pipeline((config, jax.device_put(params, shardings)))("a circle", **QUICK).frames
  assert DENOISE_STEP._cache_size() == 1
  np.testing.assert_allclose(latents, pipe("a circle", **QUICK).frames, atol=1e-4)


def test_given_noise_and_text_states_replace_drawn_and_encoded_ones(pipe):
  drawn = pipe("a circle", seed=9, **QUICK).frames
  noise = np.asarray(draw_noise(np.uint32([9]), np.uint32([0]), INITIAL, (3, 4, 6, 4)))
  _, params = draw(T5Encoder, T5_CONFIG)
  model = nnx.merge(graph_of(T5Encoder, T5_CONFIG), params)
  embeds = model(jnp.asarray(pipe._prompt_encoder.tokenizer.encode(["a circle"], 6)))
  given = pipe(latents=noise, prompt_embeds=embeds, **QUICK).frames
  np.testing.assert_allclose(given, drawn, atol=1e-5)


@pytest.mark.slow
def test_extra_frames_of_a_temporal_patch_are_dropped_from_the_front():
  pipe = make_pipeline(patch=(2, 2, 2))
  latents = pipe("a circle", **QUICK).frames
  assert latents.shape[1] == 4  # 3 rounded up to a whole number of patches.
  frames = pipe("a circle", **{**QUICK, "output_type": "np"}).frames
  vae = nnx.merge(graph_of(VAE, VAE_CONFIG), draw(VAE, VAE_CONFIG)[1])
  expected = decode(vae, jnp.asarray(latents[:, 1:]) / VAE_CONFIG.scaling_factor)
  np.testing.assert_allclose(frames, np.clip(expected / 2 + 0.5, 0, 1), atol=1e-5)


def test_output_types_hold_the_same_frames(pipe):
  floats, whole, images = (
    pipe("a circle", num_inference_steps=1, output_type=kind).frames[0]
    for kind in ("np", "uint8", "pil")
  )
  assert whole.shape == floats.shape == (9, 16, 24, 3)
  assert whole.dtype == np.uint8
  np.testing.assert_array_equal(whole, np.round(255 * floats))
  np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), whole)
  assert floats.std() > 0.05
  (frames,) = pipe("a circle", num_inference_steps=1, output_type="np", return_dict=False)
  np.testing.assert_array_equal(frames[0], floats)


def test_progress_counts_compilation_apart(traces):
  pipe = make_pipeline(depth=3)  # Which no other test has compiled.
  pipe("a circle", num_inference_steps=1)
  seconds = pipe.progress.seconds
  assert seconds["compile"] > 10 * seconds["denoise"] > 0
  assert {"encode", "decode"} < seconds.keys()


def test_a_saved_folder_gives_the_same_video(pipe, tmp_path):
  diffusers.save_transformer(tmp_path / "transformer", *draw(DiT, DIT_CONFIG))
  diffusers.save_vae(tmp_path / "vae", *draw(VAE, VAE_CONFIG))
  diffusers.save_text_encoder(tmp_path / "text_encoder", *draw(T5Encoder, T5_CONFIG))
  diffusers.save_tokenizer(tmp_path / "tokenizer", pipe._prompt_encoder.tokenizer)
  diffusers.save_scheduler(tmp_path / "scheduler", NOISE)
  folder.write_index(tmp_path, Settings(text_drop="zeros"))
  loaded = Pipeline.from_pretrained(tmp_path, progress=Progress(show=False))
  np.testing.assert_array_equal(
    loaded("a circle", **QUICK).frames, pipe("a circle", **QUICK).frames
  )


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"num_frames": 10}, r"num_frames=10.*\n.*4k \+ 1.*9 and 13"),
    ({"num_frames": 0}, "num_frames=0"),
    ({"height": 20}, "height=20.*multiple of 8"),
    ({"width": 0}, "width=0.*multiple of 8"),
    ({"num_inference_steps": 0}, "0 sampling steps"),
    ({"num_inference_steps": 1001}, "1001 sampling steps"),
    ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0"),
    ({"output_type": "pt"}, "output_type='pt'.*pil, np, uint8, latent"),
    ({"solver": "euler"}, "solver='euler'.*ddim, dpm"),
    ({"timesteps": [999, 499]}, "timesteps cannot be given.*\\n.*num_inference_steps"),
    ({"generator": object()}, "generator cannot be given.*\\n.*seed="),
    ({"attention_kwargs": {"mask": 1}}, "'mask'; only 'scale'"),
    ({"max_sequence_length": 0}, "max_sequence_length=0"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"prompt": None}, "either prompt or prompt_embeds"),
    ({"prompt": []}, "prompt is an empty list"),
    ({"prompt_embeds": np.zeros((1, 6, 8), np.float32)}, "either prompt or prompt_embeds"),
    ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
    ({"negative_prompt_embeds": np.zeros((1, 5, 8), np.float32)}, r"\(1, 6, 8\)"),
    ({"latents": np.zeros((1, 3, 4, 4, 4), np.float32)}, r"latents.*\(1, 3, 4, 6, 4\)"),
  ],
)
def test_bad_arguments_are_explained_before_anything_is_compiled(pipe, traces, arguments, message):
  with pytest.raises(UserError, match=message):
    pipe(**{"prompt": "a circle", **arguments})
  assert not traces


KINDS = {
  Pipeline: CogVideoXPipeline,
  ImageToVideo: CogVideoXImageToVideoPipeline,
  VideoToVideo: CogVideoXVideoToVideoPipeline,
}
OURS = {  # Where what diffusers has by default is said otherwise, or depends on the model.
  "max_sequence_length": (226, None),
  "callback_on_step_end_tensor_inputs": (["latents"], ("latents",)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_are_those_of_diffusers_in_their_order_with_their_defaults(kind):
  theirs = inspect.signature(KINDS[kind].__call__).parameters
  ours = inspect.signature(kind.__call__).parameters
  assert list(ours)[: len(theirs)] == list(theirs)
  for name, parameter in theirs.items():
    assert OURS.get(name, (parameter.default,) * 2) == (parameter.default, ours[name].default), name
  rest = list(ours.values())[len(theirs) :]
  assert {parameter.kind for parameter in rest} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("kind", KINDS)
def test_help_shows_every_argument_with_its_default_and_its_description(kind):
  signature, described = pydoc.plain(pydoc.render_doc(kind.__call__)).split("Args:")
  _, *parameters = inspect.signature(kind.__call__).parameters.values()
  for parameter in parameters:
    assert str(parameter) in signature
    assert re.search(rf"^ +{parameter.name}: [A-Z'{{]", described, re.MULTILINE)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_argument_is_a_type_error(kind):
  with pytest.raises(TypeError, match="unexpected keyword argument 'heigth'"):
    kind.__call__(None, None, heigth=16)


def test_arguments_may_be_positional_up_to_the_last_of_diffusers(pipe):
  named = pipe("a circle", "a square", guidance_scale=2.0, **QUICK).frames
  positional = pipe("a circle", "a square", 16, 24, 9, 3, None, 2.0, False, 1, 0.0, None, None,
                    None, None, "latent", True, None, None, ("latents",), 6).frames  # fmt: skip
  np.testing.assert_array_equal(positional, named)
  with pytest.raises(TypeError, match="positional arguments"):
    pipe(*[None] * 22)


def test_a_rotary_model_takes_other_numbers_of_text_tokens(pipe):
  short, long = (pipe("a circle", max_sequence_length=n, **QUICK).frames for n in (6, 9))
  np.testing.assert_array_equal(short, pipe("a circle", **QUICK).frames)
  assert np.abs(short - long).max() > 1e-4
  with pytest.raises(UserError, match="positions are for 6"):
    make_pipeline(positions="sincos")("a circle", max_sequence_length=9, **QUICK)


def test_slices_are_decoded_alone_to_the_same_frames(pipe):
  arguments = {**QUICK, "output_type": "np"}
  whole = pipe(["a circle", "a square"], **arguments).frames
  pipe.enable_slicing()
  slices = pipe(["a circle", "a square"], **arguments).frames
  pipe.enable_slicing(False)
  np.testing.assert_allclose(slices, whole, atol=1e-5)


def test_a_model_that_also_wants_an_image_is_refused():
  with pytest.raises(UserError, match="8 channels and makes 4"):
    make_pipeline(in_channels=8)


@pytest.mark.parametrize(
  ("prompts", "devices"),
  [(["a circle"], 4), pytest.param(["a circle", "a square"], 4, marks=pytest.mark.slow)],
)
def test_devices_share_rows_and_then_tokens_and_make_the_same_video(pipe, prompts, devices):
  """One video is two rows, on two devices each; two are four, each on its own."""
  DENOISE_STEP.clear_cache()
  several = make_pipeline(devices=jax.devices()[:devices])
  latents = several(prompts, **QUICK).frames
  assert DENOISE_STEP._cache_size() == 1
  np.testing.assert_allclose(latents, pipe(prompts, **QUICK).frames, atol=1e-4)
  several("a circle", num_inference_steps=1, output_type="np")  # The VAE's weights move along.


def test_tokens_are_split_among_devices_that_share_a_row():
  one, several = (shard_step(2, jax.devices()[:count]) for count in (1, 4))
  latents, text = np.zeros((1, 3, 4, 6, 4), np.float32), np.zeros((2, 1, 6, 8), np.float32)
  rows = jax.jit(pack_videos, static_argnums=(2, 3))(latents, text, (1, 2, 2), several)
  assert rows.vision.sharding.shard_shape(rows.vision.shape) == (1, 16, 16)
  assert rows.layout.experts.sharding.shard_shape(rows.layout.experts.shape) == (1, 16)
  assert one.row_tokens(24) == 24 and several.row_tokens(24) == 32
