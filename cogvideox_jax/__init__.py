"""CogVideoX (arXiv:2408.06072) in JAX.

Names are looked up on first use (PEP 562), so that a process that decodes video and imports
`cogvideox_jax.data.video` does not load the models.
"""

import importlib
import re
import sys
from typing import TYPE_CHECKING

from cogvideox_jax.interrupts import leave_on_signals
from cogvideox_jax.version import __version__

if TYPE_CHECKING:
  from cogvideox_jax.inference.calls_of_diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    export_to_video,
    load_image,
    load_video,
  )
  from cogvideox_jax.inference.image_to_video import ImageToVideo as CogVideoXImageToVideoPipeline
  from cogvideox_jax.inference.pipeline import Pipeline
  from cogvideox_jax.inference.pipeline import Pipeline as CogVideoXPipeline
  from cogvideox_jax.inference.video_to_video import VideoToVideo as CogVideoXVideoToVideoPipeline
  from cogvideox_jax.training.workdir import load

__all__ = [
  "CogVideoXDDIMScheduler",
  "CogVideoXDPMScheduler",
  "CogVideoXImageToVideoPipeline",
  "CogVideoXPipeline",
  "CogVideoXVideoToVideoPipeline",
  "Pipeline",
  "__version__",
  "export_to_video",
  "load",
  "load_image",
  "load_video",
]

_OF_DIFFUSERS = "cogvideox_jax.inference.calls_of_diffusers"
# Name -> its module, and its name there. Some have the names of diffusers.
_HOMES = {
  "CogVideoXDDIMScheduler": (_OF_DIFFUSERS, "CogVideoXDDIMScheduler"),
  "CogVideoXDPMScheduler": (_OF_DIFFUSERS, "CogVideoXDPMScheduler"),
  "CogVideoXImageToVideoPipeline": ("cogvideox_jax.inference.image_to_video", "ImageToVideo"),
  "CogVideoXPipeline": ("cogvideox_jax.inference.pipeline", "Pipeline"),
  "CogVideoXVideoToVideoPipeline": ("cogvideox_jax.inference.video_to_video", "VideoToVideo"),
  "Pipeline": ("cogvideox_jax.inference.pipeline", "Pipeline"),
  "export_to_video": (_OF_DIFFUSERS, "export_to_video"),
  "load": ("cogvideox_jax.training.workdir", "load"),
  "load_image": (_OF_DIFFUSERS, "load_image"),
  "load_video": (_OF_DIFFUSERS, "load_video"),
}


# `python -m cogvideox_jax.NAME`: a signal may come while the command's libraries load.
if sys.argv[:1] == ["-m"] and any(
  re.fullmatch(r"cogvideox_jax\.\w+", arg) for arg in sys.orig_argv
):
  leave_on_signals()


def __getattr__(name: str):
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module, own_name = _HOMES[name]
  return getattr(importlib.import_module(module), own_name)
