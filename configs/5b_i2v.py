"""CogVideoX-5B-I2V: the 5B that sees an image, with learned positions besides the rotary ones.

Source of the model's values: the published transformer/config.json in diffusers' layout, and SAT's
configs/cogvideox_5b_i2v.yaml, which agree.
"""

import importlib

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = importlib.import_module("configs.5b").get_config().unlock()
  config.model.update(
    in_channels=32,  # Noised latents, then those of the image.
    learned_positions=True,  # use_learned_positional_embeddings: fixes 49 frames of 720x480.
  )
  # One stage, of the only size that learned positions allow. How it was trained was not published.
  # Four clips a row, 1000 a batch, and the steps: P Table 5, stage 2.
  config.stages = ConfigDict()
  config.stages.stage1 = base.stage(
    sizes=((480, 720),), durations=(49,), rows=256, row_tokens=71_104, max_clips=4
  )
  config.train.steps = 220_000
  config.preview.update(num_frames=49, height=480, width=720)
  return config.lock()
