"""What previews a training run leaves."""

from dataclasses import asdict

import numpy as np
from drawn import DIT_CONFIG, T5_CONFIG, VAE_CONFIG, draw
from etils import epath
from PIL import Image
from small_run import make_config

from cogvideox_jax.conversion import diffusers
from cogvideox_jax.data.mp4 import read_metadata
from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.data.video import probe
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.t5 import T5Encoder
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.training.preview import Previewer


def test_previews_are_the_prompts_side_by_side_and_a_sheet_of_them(tmp_path):
  model = epath.Path(tmp_path) / "model"
  diffusers.save_vae(model / "vae", *draw(VAE, VAE_CONFIG))
  diffusers.save_text_encoder(model / "text_encoder", *draw(T5Encoder, T5_CONFIG))
  assets = epath.resource_path("cogvideox_jax") / "assets"
  diffusers.save_tokenizer(model / "tokenizer", Tokenizer(assets / "tiny" / "tokenizer"))
  prompts = ("a red circle", "a blue square")
  config = make_config(
    epath.Path(tmp_path), preview__prompts=prompts, preview__num_frames=9, preview__height=16,
    preview__width=24, preview__steps=2, text__drop="zeros",
    **{f"model__{key}": value for key, value in asdict(DIT_CONFIG).items()},
  )  # fmt: skip
  folder = epath.Path(tmp_path) / "previews"
  Previewer(config, folder).write(40, *draw(DiT, DIT_CONFIG))

  info = probe(folder / "step_000040.mp4")
  assert (info.num_frames, info.height, info.width, info.fps) == (9, 16, 48, 8.0)
  assert read_metadata(folder / "step_000040.mp4") == {"step": 40, "prompts": list(prompts)}
  with Image.open(folder / "step_000040.png") as sheet:
    assert np.asarray(sheet).std() > 0
