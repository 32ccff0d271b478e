"""CogVideoX1.5-5B: the 5B with patches of two latent frames, and positions that are plain indices.

Sources: D the published transformer/config.json in diffusers' layout; S SAT's
configs/cogvideox1.5_5b.yaml; C diffusers' converter from SAT.
"""

import importlib

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = importlib.import_module("configs.5b").get_config().unlock()
  config.model.update(
    patch=(2, 2, 2),  # D patch_size_t, S.
    positions="rope_index",  # D: what patch_size_t means to diffusers' pipelines.
    sample_frames=81,  # D, C.
    sample_height=300,  # C, S; later copies of D say 96, the height of 768 pixels.
    sample_width=300,  # C, S; later copies of D say 170, the width of 1360 pixels.
    text_length=226,  # D; S says 224.
  )
  config.data.fps = 16.0
  # Six seconds, and in the last two stages ten, as of P Table 5, at this frame rate.
  six_seconds = (1, 17, 33, 65, 97)
  for name in ("stage1", "stage2"):
    config.stages[name].durations = six_seconds
  for name in ("stage3", "stage4"):
    config.stages[name].durations = (*six_seconds, 161)
  return config.lock()
