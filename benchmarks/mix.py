"""The clips that benchmarks use: a realistic mix, for rows of the paper's lengths."""

import numpy as np

from cogvideox_jax.data import packing

FRAMES = np.array([1, 9, 17, 33, 49])  # Half of the clips are images.
FRAME_RATES = np.array([4, 1, 1, 1, 1]) / 8
SHORT_SIDES = np.array([256, 480, 768])  # The paper's three resolutions, equally often.
ASPECTS = np.array([1, 4 / 3, 3 / 4, 16 / 9, 9 / 16])  # Width over height, equally often.
TEXT_SHAPE = (226, 4096)
# Tokens of a row -> the most clips. Each slot takes 1.85 MB of text states, used or not.
ROWS = {25_600: 16, 75_776: 24, 716_800: 160}


def draw_mix(clips: int, seed: int = 0) -> np.ndarray:
  """Draws (frames, height, width) in pixels of a realistic mix; sides are multiples of 16."""
  rng = np.random.default_rng(seed)
  frames = rng.choice(FRAMES, clips, p=FRAME_RATES)
  short, aspect = rng.choice(SHORT_SIDES, clips), rng.choice(ASPECTS, clips)
  long = np.int64(np.round(short * np.maximum(aspect, 1 / aspect) / 16)) * 16
  height, width = np.where(aspect > 1, short, long), np.where(aspect > 1, long, short)
  return np.column_stack([frames, height, width])


def latent_shapes(sizes: np.ndarray) -> np.ndarray:
  """Latent shapes (f, h, w, c) of clips of (frames, height, width) pixels."""
  return np.column_stack(
    [(sizes[:, 0] + 3) // 4, sizes[:, 1:] // 8, np.full(len(sizes), 16)]
  ).astype(np.int32)


def token_counts(clips: int) -> np.ndarray:
  """Tokens of each clip of the mix, text included."""
  latents = latent_shapes(draw_mix(clips))[:, :3]
  return packing.clip_tokens(latents, patch=(1, 2, 2), text_length=TEXT_SHAPE[0])
