"""Noises copies of a clip's first frame, the images that image-to-video models are trained with.

In the published training (SAT `add_noise_to_first_frame`) every step adds new noise to the pixels
of the first frame, with a standard deviation that is drawn too, and runs the VAE on them. Here that
is done when clips are encoded: a few copies of each first frame are noised and encoded, and the
epochs use them in turn. Every step still draws a new sample of the copy's posterior. The reasons:

- A packed row holds clips of many sizes. In the step, the VAE would need one program for each mix
  of sizes, or frames padded to one size, from which its group norms would compute other latents.
- The step would need the pixels (1 MB for a clip of 480x720) and the VAE's encoder (92M parameters)
  on every device, for one frame of 49.
- A copy adds one latent frame to the 13 of a clip of 49 frames, and little to the VAE's work. Until
  there have been more epochs than copies, no noise is seen twice, as in the published training.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8


class ImageNoise(NamedTuple):
  """How first frames are noised; the published values are in configs/base.py."""

  draws: int  # Noised copies of each frame.
  # Mean and standard deviation of the normal distribution of the logarithm of the noise's standard
  # deviation, for pixels in [-1, 1].
  log_sigma_mean: float
  log_sigma_std: float
  seed: int


def noised_copies(
  frame: UInt8[np.ndarray, "H W 3"], source: str, noise: ImageNoise
) -> Float32[np.ndarray, "draws H W 3"]:
  """Returns noised copies of a frame in [-1, 1]; the noise is not clipped.

  Args:
    source: the name of the clip; the noise depends only on it and on the seed.
  """
  name = hashlib.blake2b(source.encode(), digest_size=8).digest()
  key = np.random.SeedSequence([noise.seed % 2**64, int.from_bytes(name, "little")])
  rng = np.random.Generator(np.random.Philox(key))
  sigma = np.exp(rng.normal(noise.log_sigma_mean, noise.log_sigma_std, size=noise.draws))
  drawn = rng.standard_normal((noise.draws, *frame.shape), np.float32)
  return np.float32(frame) / 127.5 - 1 + sigma.astype(np.float32)[:, None, None, None] * drawn
