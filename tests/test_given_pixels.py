"""Videos from images and from videos, and a call's other hooks, on models of drawn weights."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from drawn import VAE_CONFIG, ZEROS, make_pipeline
from PIL import Image

from cogvideox_jax.errors import UserError
from cogvideox_jax.inference.image_to_video import ImageToVideo
from cogvideox_jax.inference.pipeline import Pipeline
from cogvideox_jax.inference.video_to_video import VideoToVideo

QUICK = {"num_inference_steps": 3, "output_type": "latent"}
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
VIDEO = np.random.default_rng(1).integers(0, 256, (9, 16, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def from_image() -> ImageToVideo:
  return make_pipeline(kind=ImageToVideo, in_channels=8)


@pytest.fixture(scope="module")
def from_video() -> VideoToVideo:
  return make_pipeline(kind=VideoToVideo)


def image_call(pipe, image, prompt="a circle", **changes):
  return pipe(image, prompt, **{"num_frames": 9, **QUICK, **changes}).frames


def test_a_video_depends_on_its_own_image_alone(from_image):
  together = image_call(from_image, IMAGES, ["a circle", "a square"], seed=[1, 2], batch_size=2)
  alone = image_call(from_image, IMAGES[1], "a square", seed=2)
  np.testing.assert_allclose(together[1:], alone, atol=1e-4)
  other = image_call(from_image, IMAGES[0], "a square", seed=2)
  assert np.abs(other - alone).max() > 1e-2


def test_an_image_may_be_bytes_floats_or_pil(from_image):
  expected = image_call(from_image, IMAGES[0])
  for image in (IMAGES[0] / np.float32(255), Image.fromarray(IMAGES[0])):
    np.testing.assert_allclose(image_call(from_image, image), expected, atol=1e-5)
  with pytest.warns(UserWarning, match="below 0"):
    signed = image_call(from_image, IMAGES[0] / np.float32(127.5) - 1)
  np.testing.assert_allclose(signed, expected, atol=1e-4)


def test_an_array_of_another_size_is_brought_to_the_nearest_pixels(from_image):
  doubled = IMAGES[0].repeat(2, axis=0).repeat(2, axis=1)
  np.testing.assert_allclose(
    image_call(from_image, doubled), image_call(from_image, IMAGES[0]), atol=1e-5
  )


@pytest.mark.parametrize("inverts", [False, True])
def test_the_scale_of_image_latents_can_be_chosen(inverts):
  config = dataclasses.replace(VAE_CONFIG, scaling_factor=0.5, invert_scale_latents=inverts)
  pipe = make_pipeline(kind=ImageToVideo, vae_config=config, in_channels=8)
  unit = make_pipeline(
    kind=ImageToVideo, vae_config=dataclasses.replace(config, scaling_factor=1.0), in_channels=8
  )
  raw = image_call(unit, IMAGES[0])
  np.testing.assert_array_equal(image_call(pipe, IMAGES[0], image_scale="raw"), raw)
  trained_raw = dataclasses.replace(ZEROS, image_scale="raw")
  pipe_of_raw = make_pipeline(
    kind=ImageToVideo, vae_config=config, settings=trained_raw, in_channels=8
  )
  np.testing.assert_array_equal(image_call(pipe_of_raw, IMAGES[0]), raw)
  default = image_call(pipe, IMAGES[0])
  scaled = image_call(pipe, IMAGES[0], image_scale="scaled")
  assert np.abs(scaled - raw).max() > 1e-3
  assert np.array_equal(default, scaled) != inverts
  assert np.abs(default - raw).max() > 1e-3


def test_learned_positions_fix_the_size(from_image):
  pipe = make_pipeline(kind=ImageToVideo, in_channels=8, learned_positions=True, positions="rope")
  assert image_call(pipe, IMAGES[0]).shape == (1, 3, 4, 6, 4)
  for size in ({"num_frames": 5}, {"height": 24}, {"num_frames": 49}):
    with pytest.raises(UserError, match=r"learned positions.*9 frames of 24x16"):
      image_call(pipe, IMAGES[0], **size)


def test_a_video_is_kept_the_more_the_weaker_the_change(from_video):
  call = {"num_inference_steps": 20, "output_type": "np"}
  frames = [from_video(VIDEO, "a circle", strength=s, **call).frames for s in (0.05, 0.5, 1.0)]
  assert frames[0].shape == (1, 9, 16, 24, 3)
  distances = [np.abs(x - frames[0]).mean() for x in frames]
  assert distances[0] < distances[1] < distances[2]


def test_videos_are_noised_each_by_itself(from_video):
  videos = np.stack([VIDEO, VIDEO[::-1]])
  together = from_video(videos, ["a circle", "a square"], seed=[3, 4], solver="dpm", **QUICK).frames
  alone = from_video(VIDEO[::-1], "a square", seed=4, solver="dpm", **QUICK).frames
  np.testing.assert_allclose(together[1:], alone, atol=1e-4)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"video": VIDEO[:8]}, "num_frames=8"),
    ({"video": VIDEO, "strength": 1.5}, "strength=1.5"),
    ({"video": VIDEO, "strength": 0.1}, "of 3 steps is none"),
    ({}, "either video or latents"),
    ({"video": np.stack([VIDEO] * 3)}, "3 videos for 1 prompts"),
  ],
)
def test_bad_videos_are_explained(from_video, arguments, message):
  with pytest.raises(UserError, match=message):
    from_video(prompt="a circle", **arguments, **QUICK)


@pytest.mark.parametrize(
  ("image", "message"),
  [
    (IMAGES[[0, 1, 0]], "3 images for 1 prompts"),
    (IMAGES[0, :, :, :2], "3 channels"),
  ],
)
def test_bad_images_are_explained(from_image, image, message):
  with pytest.raises(UserError, match=message):
    image_call(from_image, image)


def test_a_transformer_is_refused_by_the_pipeline_of_the_other_kind():
  with pytest.raises(UserError, match=r"sees an image.*\nUse ImageToVideo"):
    make_pipeline(in_channels=8)
  with pytest.raises(UserError, match=r"sees no image.*\nUse Pipeline"):
    make_pipeline(kind=ImageToVideo)


def test_a_callback_sees_every_step_and_may_change_its_arrays(from_video):
  pipe: Pipeline = make_pipeline()
  seen = []

  def watch(_, step, timestep, arrays):
    seen.append((step, timestep, sorted(arrays)))
    return {}

  names = ["latents", "prompt_embeds"]
  plain = pipe(
    "a circle",
    callback_on_step_end=watch,
    callback_on_step_end_tensor_inputs=names,
    **QUICK,
  ).frames
  assert seen == [(0, 999, names), (1, 666, names), (2, 332, names)]
  np.testing.assert_array_equal(plain, pipe("a circle", **QUICK).frames)

  def blank(_, step, timestep, arrays):
    return {"latents": jnp.zeros_like(arrays["latents"])} if step == 2 else {}

  assert not pipe("a circle", callback_on_step_end=blank, **QUICK).frames.any()
  with pytest.raises(UserError, match="callback_on_step_end_tensor_inputs='noise'"):
    pipe("a circle", callback_on_step_end_tensor_inputs=["noise"], **QUICK)


TILED = dataclasses.replace(VAE_CONFIG, sample_height=48, sample_width=40)


def whole_and_tiled(**size):
  """The same frame, decoded whole and in tiles."""
  pipe = make_pipeline(vae_config=TILED)
  call = {"num_inference_steps": 1, "output_type": "np", "num_frames": 1, **size}
  whole = pipe("a circle", **call).frames
  pipe.enable_tiling()
  return whole, pipe("a circle", **call).frames


def test_tiles_do_not_change_a_small_video_and_must_meet():
  whole, tiled = whole_and_tiled(height=24, width=16)
  np.testing.assert_array_equal(tiled, whole)
  with pytest.raises(UserError, match="do not meet"):
    make_pipeline(vae_config=dataclasses.replace(TILED, sample_height=32)).enable_tiling()


@pytest.mark.slow
def test_tiles_change_a_large_video_little():
  whole, tiled = whole_and_tiled(height=48, width=40)
  assert tiled.shape == whole.shape
  assert 0 < np.abs(tiled - whole).mean() < 0.1
