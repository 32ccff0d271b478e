"""What tests encode: few small clips, by a model of drawn weights."""

import json
from functools import partial
from pathlib import Path

import numpy as np
from drawn import T5_CONFIG, VAE_CONFIG, draw
from etils import epath

from cogvideox_jax.conversion import diffusers
from cogvideox_jax.data.mp4 import write_mp4
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.models.t5 import T5Encoder
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.precompute import encode_clips
from configs import tiny

TOKENIZER = epath.resource_path("cogvideox_jax") / "assets" / "tiny" / "tokenizer"


# One process decodes, which starts sooner than several; the result does not depend on their number.
encode = partial(encode_clips.encode, workers=1)


def make_encoders(folder: Path) -> str:
  """A model folder without a transformer."""
  diffusers.save_vae(folder / "vae", *draw(VAE, VAE_CONFIG))
  diffusers.save_text_encoder(folder / "text_encoder", *draw(T5Encoder, T5_CONFIG))
  diffusers.save_tokenizer(folder / "tokenizer", Tokenizer(TOKENIZER))
  return str(folder)


def small_config():
  config = tiny.get_config()
  config.model.text_length = 6
  config.stages.tiny.update(sizes=((16, 16), (8, 16)), durations=(1, 9))
  return config


def write_clips(folder, count, seed=0):
  """Videos of 9 frames and, every third, an image, with captions."""
  rng = np.random.default_rng(seed)
  folder.mkdir()
  lines = []
  for index in range(count):
    file = f"{index:03d}.mp4"
    frames = rng.integers(0, 255, (1 if index % 3 == 0 else 9, 16, 16, 3), np.uint8)
    write_mp4(folder / file, frames, 8.0)
    lines.append({"file": file, "caption": f"number {index}"})
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "manifest.jsonl").write_text(text)
  return folder


def sources(output):
  dataset = Dataset(output / "tiny")
  return [dataset[index].source for index in range(len(dataset))]
