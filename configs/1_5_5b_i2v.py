"""CogVideoX1.5-5B-I2V: the 1.5 that sees an image, and is told a constant, `ofs`.

Source of every value: the published transformer/config.json in diffusers' layout, and SAT's
configs/cogvideox1.5_5b_i2v.yaml, which agree.
"""

import importlib

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = importlib.import_module("configs.1_5_5b").get_config().unlock()
  config.model.update(
    in_channels=32,  # Noised latents, then those of the image.
    ofs_width=512,  # ofs_embed_dim
  )
  return config.lock()
