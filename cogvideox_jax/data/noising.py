"""Noised copies of a clip's first frame: the images that image to video is trained with.

In the published training (SAT `add_noise_to_first_frame`) every step noises the pixels of the first
frame anew, by a deviation that is drawn too, and runs the VAE on them. Here that is done when clips
are encoded: a few copies of each first frame, of which epochs take turns. The posterior of a copy
is sampled anew in every step, as that of the clip. The reasons:

- A packed row holds clips of many sizes. In the step, the VAE would need a program for each mix of
  them, or frames padded to one size, of which its group norms would make other latents.
- The step would carry pixels (1 MB a clip of 480x720) and the VAE's encoder (92M parameters), and
  keep them on every device, for one frame of 49.
- A copy adds one latent frame to the 13 of a clip of 49 frames, and as little to the VAE's work.
  As many epochs as there are copies see no noise twice, which is then the published training.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8


class ImageNoise(NamedTuple):
  """How first frames are noised; the published values are in configs/base.py."""

  draws: int  # Copies of each.
  log_sigma_mean: float  # Of a normal distribution, as is the next: the logarithm of the noise's
  log_sigma_std: float  # deviation, where pixels are in [-1, 1].
  seed: int


def noised_copies(
  frame: UInt8[np.ndarray, "H W 3"], source: str, noise: ImageNoise
) -> Float32[np.ndarray, "draws H W 3"]:
  """In [-1, 1] but for the noise, which is not clipped. The source and the seed decide it."""
  name = hashlib.blake2b(source.encode(), digest_size=8).digest()
  key = np.random.SeedSequence([noise.seed % 2**64, int.from_bytes(name, "little")])
  rng = np.random.Generator(np.random.Philox(key))
  sigma = np.exp(rng.normal(noise.log_sigma_mean, noise.log_sigma_std, size=noise.draws))
  drawn = rng.standard_normal((noise.draws, *frame.shape), np.float32)
  return np.float32(frame) / 127.5 - 1 + sigma.astype(np.float32)[:, None, None, None] * drawn
