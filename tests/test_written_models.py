"""Model folders that we write, as diffusers and this package open them."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conversion_models import AUTOENCODER, DIT, NOISE, TEXT, TOKENIZER, drawn
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from flax import nnx
from transformers import T5EncoderModel

from cogvideox_jax.conversion import diffusers
from cogvideox_jax.conversion.folder import Settings, open_model, write_index
from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.inference.packed_rows import clip_layout
from cogvideox_jax.models.attention import attention
from cogvideox_jax.models.dit import DiT, patchify, timestep_sinusoid, unpatchify
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.t5 import T5Encoder
from cogvideox_jax.models.vae import VAE, decode


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
  """A whole model of ours, with drawn weights."""
  folder = tmp_path_factory.mktemp("model")
  components = {
    "transformer": (DiT, DIT, diffusers.save_transformer),
    "vae": (VAE, AUTOENCODER, diffusers.save_vae),
    "text_encoder": (T5Encoder, TEXT, diffusers.save_text_encoder),
  }
  for seed, (name, (model, config, save)) in enumerate(components.items()):
    save(folder / name, config, drawn(model, config, seed))
  diffusers.save_scheduler(folder / "scheduler", NOISE)
  diffusers.save_tokenizer(folder / "tokenizer", Tokenizer(TOKENIZER))
  write_index(folder, Settings(text_drop="zeros", guidance_scale=2.0, fps=4.0))
  return folder


def test_diffusers_opens_a_folder_of_ours_whole(model_folder):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Those of diffusers and transformers.
    pipe = CogVideoXPipeline.from_pretrained(str(model_folder))
    ids = pipe.tokenizer(["a red ball"], padding="max_length", max_length=10).input_ids
    video = pipe(
      "a red ball",
      num_frames=9,
      height=32,
      width=32,
      num_inference_steps=2,
      max_sequence_length=DIT.text_length,
      output_type="np",
    ).frames
  assert video.shape == (1, 9, 32, 32, 3)
  assert pipe.scheduler.config.snr_shift_scale == NOISE.snr_shift
  ours = open_model(model_folder).tokenizer().encode(["a red ball"], 10)
  np.testing.assert_array_equal(ids, ours)


def test_we_open_a_folder_of_ours_whole(model_folder):
  model = open_model(model_folder)
  assert model.settings() == Settings(text_drop="zeros", guidance_scale=2.0, fps=4.0)
  assert model.transformer()[0] == DIT
  assert model.vae()[0] == AUTOENCODER
  assert model.text_encoder()[0] == TEXT
  assert model.scheduler() == NOISE


def test_our_text_encoder_gives_the_same_states_in_transformers(model_folder):
  ids = np.random.default_rng(0).integers(0, TEXT.vocab, (2, 30))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    reference = T5EncoderModel.from_pretrained(str(model_folder / "text_encoder"))
  with torch.no_grad():
    expected = reference(torch.from_numpy(ids))[0]
  config, params = open_model(model_folder).text_encoder()
  states = nnx.merge(graph_of(T5Encoder, config), params)(jnp.asarray(ids))
  np.testing.assert_allclose(states, expected, atol=2e-5)


def test_our_vae_gives_the_same_frames_in_diffusers(model_folder):
  z = np.random.default_rng(0).normal(size=(1, 3, 2, 3, 4)).astype(np.float32)
  reference = AutoencoderKLCogVideoX.from_pretrained(str(model_folder / "vae"))
  with torch.no_grad():
    expected = reference.decode(torch.from_numpy(z).permute(0, 4, 1, 2, 3)).sample
  config, params = open_model(model_folder).vae()
  frames = decode(nnx.merge(graph_of(VAE, config), params), jnp.asarray(z))
  np.testing.assert_allclose(frames, expected.permute(0, 2, 3, 4, 1), atol=5e-5)


def test_our_transformer_gives_the_same_v_in_diffusers(tmp_path):
  config = dataclasses.replace(DIT, positions="sincos")
  params = drawn(DiT, config, 3)
  diffusers.save_transformer(tmp_path, config, params)
  rng = np.random.default_rng(0)
  latents = rng.normal(size=(2, 4, 6, 4)).astype(np.float32)
  text = rng.normal(size=(DIT.text_length, DIT.text_width)).astype(np.float32)
  reference = CogVideoXTransformer3DModel.from_pretrained(str(tmp_path))
  with torch.no_grad():
    expected = reference(
      torch.from_numpy(latents).permute(0, 3, 1, 2)[None],
      torch.from_numpy(text)[None],
      torch.tensor([7]),
    ).sample
  layout = clip_layout(latents.shape[:3], DIT.text_length, DIT.patch)
  run = jax.jit(nnx.merge(graph_of(DiT, config), params).__call__, static_argnames="attention")
  v = run(
    jnp.pad(patchify(jnp.asarray(latents), DIT.patch), ((DIT.text_length, 0), (0, 0)))[None],
    jnp.asarray(text)[None, None],
    jnp.broadcast_to(timestep_sinusoid(jnp.asarray(7), DIT.width), (1, 2, DIT.width)),
    jax.tree.map(jnp.asarray, layout),
    attention=attention,
  )
  v = unpatchify(v[0, DIT.text_length :], DIT.patch, tuple(layout.grids[0, 1].tolist()))
  np.testing.assert_allclose(v, expected[0].permute(0, 2, 3, 1), atol=2e-4)
