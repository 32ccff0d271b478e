"""Error messages that say what to do when a phase of sampling runs out of memory."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import jax

from cogvideox_jax.errors import UserError

OFFLOAD = "--offload (offload=True): components that are not in use stay in the host's memory"
TILING = "--tiling (enable_tiling()): the VAE takes one tile of the frames at a time"
SMALLER = "--height, --width, --num_frames: a smaller or shorter video"
FEWER = "(batch_size=1): of several videos, one at a time"
SHARED = "more devices, which share each step"
LARGER = "devices, and a host, with more memory"

LOAD, TEXT, GIVEN, DENOISE, DECODE = (
  "loading the parameters",
  "encoding the prompts",
  "encoding the image or video",
  "denoising",
  "decoding the video",
)
# What helps in each phase, least intrusive first. Devices share only the denoising steps.
REMEDIES = {
  LOAD: (OFFLOAD, LARGER),
  TEXT: (OFFLOAD, FEWER, LARGER),
  GIVEN: (OFFLOAD, TILING, FEWER, SMALLER, LARGER),
  DENOISE: (OFFLOAD, FEWER, SMALLER, SHARED, LARGER),
  DECODE: (OFFLOAD, TILING, FEWER, SMALLER, LARGER),
}


@contextmanager
def explained(phase: str, in_use: Collection[str]) -> Iterator[None]:
  """Turns XLA's RESOURCE_EXHAUSTED, from compiling or running, into advice.

  Args:
    phase: a key of REMEDIES.
    in_use: remedies that are not advised because they are in use.

  Raises:
    UserError: the code inside ran out of memory; XLA's error is its cause.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    remedies = [remedy for remedy in REMEDIES[phase] if remedy not in in_use]
    raise UserError(
      f"Out of memory while {phase}.\n"
      "What helps, by the flag of `sample` or (from Python):\n  " + "\n  ".join(remedies)
    ) from error
