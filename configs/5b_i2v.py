"""CogVideoX-5B-I2V: the 5B for image to video, with learned positions besides the rotary ones.

The model's values are those of the published transformer/config.json in diffusers' layout and of
SAT's configs/cogvideox_5b_i2v.yaml, which agree.
"""

import importlib

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = importlib.import_module("configs.5b").get_config().unlock()
  config.model.update(
    in_channels=32,  # The noised latents, then the image's latents.
    learned_positions=True,  # use_learned_positional_embeddings: fixes 49 frames of 720x480.
  )
  # One stage, with the only size that learned positions allow. Its training was not published. A
  # row holds four clips, a batch about 1000. The steps are those of stage 2 in the paper's Table 5.
  config.stages = ConfigDict()
  config.stages.stage1 = base.stage(
    sizes=((480, 720),), durations=(49,), rows=256, row_tokens=71_104, max_clips=4
  )
  config.train.steps = 220_000
  config.preview.update(num_frames=49, height=480, width=720)
  return config.lock()
