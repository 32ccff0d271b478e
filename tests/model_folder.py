"""A model folder of drawn weights, with which commands run as with a real one."""

from pathlib import Path

from drawn import DIT_CONFIG, NOISE, T5_CONFIG, VAE_CONFIG, ZEROS, draw

from cogvideox_jax.conversion import diffusers
from cogvideox_jax.conversion.folder import open_model, write_index
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.t5 import T5Encoder
from cogvideox_jax.models.vae import VAE


def make_model(folder: Path) -> Path:
  """Writes one to `folder`, which it returns. Its tokenizer is the shipped model's."""
  diffusers.save_transformer(folder / "transformer", *draw(DiT, DIT_CONFIG))
  diffusers.save_vae(folder / "vae", *draw(VAE, VAE_CONFIG))
  diffusers.save_text_encoder(folder / "text_encoder", *draw(T5Encoder, T5_CONFIG))
  diffusers.save_scheduler(folder / "scheduler", NOISE)
  diffusers.save_tokenizer(folder / "tokenizer", open_model("tiny").tokenizer())
  write_index(folder, ZEROS)
  return folder
