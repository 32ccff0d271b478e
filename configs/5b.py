"""CogVideoX-5B: 42 layers of width 3072, rotary positions. Trains in the four stages of base.py.

The stages train with `rope_index`, the extrapolation of the paper's section 2.4. At 480x720, the
size of the published model, the published rule `rope` gives the same positions.

Sources: "P" is the paper's Table 6, "D" the published transformer/config.json and
scheduler/scheduler_config.json in diffusers' layout, "S" SAT's configs/cogvideox_5b.yaml.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.update(
    depth=42,  # P, D, S.
    heads=48,  # P, D, S.
    head_dim=64,  # D, S.
    positions="rope",  # D use_rotary_positional_embeddings, without patch_size_t.
    sample_frames=49,  # D
    sample_height=60,  # D
    sample_width=90,  # D
  )
  config.noise.snr_shift = 1.0  # D snr_shift_scale; S has none.
  return config.lock()
