"""What a call of a pipeline returns."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

OUTPUT_TYPES = ("pil", "np", "uint8", "latent")


class VideoOutput(NamedTuple):
  """What a call returns: `frames[k]` is video k; the videos of one prompt are neighbours.

  The type of `frames` depends on output_type:
    pil: lists of PIL images.
    np: float32 [b F H W 3] in [0, 1].
    uint8: the same, rounded to 0..255.
    latent: float32 [b f h w c], scaled, with the extra latent frames of CogVideoX 1.5.
  """

  frames: Any


def as_output(frames: Float[np.ndarray, "b F H W 3"], output_type: str) -> Any:
  """Converts frames in [0, 1] to `pil`, `np` or `uint8`; rounds as diffusers does."""
  if output_type == "np":
    return frames
  rounded = np.round(255 * frames).astype(np.uint8)
  if output_type == "uint8":
    return rounded
  return [[Image.fromarray(frame) for frame in video] for video in rounded]
