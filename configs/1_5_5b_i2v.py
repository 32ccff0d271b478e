"""CogVideoX1.5-5B-I2V: the 1.5 for image to video, with a constant input, `ofs`.

The model's values are those of the published transformer/config.json in diffusers' layout and of
SAT's configs/cogvideox1.5_5b_i2v.yaml, which agree.
"""

import importlib

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = importlib.import_module("configs.1_5_5b").get_config().unlock()
  config.model.update(
    in_channels=32,  # The noised latents, then the image's latents.
    ofs_width=512,  # ofs_embed_dim
  )
  # Users report that unscaled image latents look best; the scale of its training was not published.
  config.image.scale = "raw"
  # One stage. Its data and its length were not published. A clip has up to 45,106 tokens, so a row
  # holds two, and a batch about 256. The steps are those of stage 3 in the paper's Table 5.
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
