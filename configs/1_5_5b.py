"""CogVideoX1.5-5B: the 5B with patches of two latent frames and plain indices as positions.

Sources: "D" is the published transformer/config.json in diffusers' layout, "S" is SAT's
configs/cogvideox1.5_5b.yaml, and "C" is diffusers' converter from SAT.
"""

import importlib

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = importlib.import_module("configs.5b").get_config().unlock()
  config.model.update(
    patch=(2, 2, 2),  # D patch_size_t, S.
    positions="rope_index",  # D: diffusers' pipelines infer it from patch_size_t.
    sample_frames=81,  # D, C.
    sample_height=300,  # C, S; later copies of D say 96, which is 768 pixels.
    sample_width=300,  # C, S; later copies of D say 170, which is 1360 pixels.
    text_length=226,  # D; S says 224.
  )
  config.data.fps = 16.0
  # The longest clip has 6 seconds at this frame rate, and 10 seconds in the last two stages, as in
  # the paper's Table 5.
  six_seconds = (1, 17, 33, 65, 97)
  for name in ("stage1", "stage2"):
    config.stages[name].durations = six_seconds
  for name in ("stage3", "stage4"):
    config.stages[name].durations = (*six_seconds, 161)
  return config.lock()
