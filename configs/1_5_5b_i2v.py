"""CogVideoX1.5-5B-I2V: the 1.5 that sees an image, and is told a constant, `ofs`.

Source of the model's values: the published transformer/config.json in diffusers' layout, and SAT's
configs/cogvideox1.5_5b_i2v.yaml, which agree.
"""

import importlib

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = importlib.import_module("configs.1_5_5b").get_config().unlock()
  config.model.update(
    in_channels=32,  # Noised latents, then those of the image.
    ofs_width=512,  # ofs_embed_dim
  )
  # Whichever scale it was trained with, users report that its latents serve best as they are.
  config.image.scale = "raw"
  # One stage; what it is trained on and how long was not published. Up to 45,106 tokens, two a row,
  # about 256 clips a batch, and the steps: P Table 5, stage 3.
  config.stages = ConfigDict()
  config.stages.stage1 = base.stage(
    sizes=((768, 1360), (768, 1024), (768, 768), (1024, 768), (1360, 768)),
    durations=(81,),
    rows=128,
    row_tokens=90_240,
    max_clips=4,
  )
  config.train.steps = 120_000
  config.preview.update(num_frames=81, height=768, width=1360)
  return config.lock()
