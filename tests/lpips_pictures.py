"""Pairs of pictures that reference values of LPIPS are computed for."""

import numpy as np

SIZES = ((64, 64), (97, 131), (256, 256))


def pictures(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Three pairs in [-1, 1]: noise and noise; waves and noisy waves; waves and one colour."""
  draws = np.random.RandomState(height)  # Its numbers are the same in every version of numpy.
  noise = draws.uniform(-1, 1, (3, height, width, 3))
  y, x = np.mgrid[:height, :width]
  waves = np.stack([np.sin(x / 5), np.sin(y / 7), np.sin((x + y) / 11)], axis=-1)
  first = np.stack([noise[0], waves, waves])
  second = np.stack([noise[1], 0.8 * waves + 0.2 * noise[2], np.full_like(waves, 0.25)])
  return first.astype(np.float32), second.astype(np.float32)
