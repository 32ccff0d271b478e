"""CogVideoX-2B: 30 layers of width 1920, sincos positions. Trains in the four stages of base.py.

Sources: "P" is the paper's Table 6, "D" the published transformer/config.json and
scheduler/scheduler_config.json in diffusers' layout, "S" SAT's configs/cogvideox_2b.yaml.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.update(
    depth=30,  # D, S; P.
    heads=30,  # D, S; P prints 32.
    head_dim=64,  # D, S.
    positions="sincos",  # D use_rotary_positional_embeddings = false.
    spatial_interpolation=1.875,  # D: 60 / 32, the ratio of stage 2 to stage 1.
    sample_frames=49,  # D
    sample_height=60,  # D
    sample_width=90,  # D
  )
  # The published 1.875 interpolates from stage 1 to stage 2. Section 2.4 of the paper prefers
  # extrapolation.
  config.train.growth = "interpolate"
  config.noise.snr_shift = 3.0  # D snr_shift_scale, S shift_scale.
  return config.lock()
