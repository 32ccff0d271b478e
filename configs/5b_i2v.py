"""CogVideoX-5B-I2V: the 5B that sees an image, with learned positions besides the rotary ones.

Source of every value: the published transformer/config.json in diffusers' layout, and SAT's
configs/cogvideox_5b_i2v.yaml, which agree.
"""

import importlib

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = importlib.import_module("configs.5b").get_config().unlock()
  config.model.update(
    in_channels=32,  # Noised latents, then those of the image.
    learned_positions=True,  # use_learned_positional_embeddings: fixes 49 frames of 720x480.
  )
  return config.lock()
