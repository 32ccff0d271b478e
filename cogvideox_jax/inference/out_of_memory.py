"""What to do when the memory is too small for a phase of sampling."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import jax

from cogvideox_jax.errors import UserError

OFFLOAD = "--offload (offload=True): parts that wait for their turn lie in the host's memory"
TILING = "--tiling (enable_tiling()): the VAE takes one tile of the frames at a time"
SMALLER = "--height, --width, --num_frames: a smaller or shorter video"
FEWER = "(batch_size=1): of several, one at a time"
SHARED = "more devices, which share each step"
LARGER = "devices, and a host, with more memory"

LOAD, TEXT, GIVEN, DENOISE, DECODE = (
  "loading the parameters",
  "encoding the prompts",
  "encoding the image or video",
  "denoising",
  "decoding the video",
)
REMEDIES = {  # Those that change least first. Only a denoising step is shared by devices.
  LOAD: (OFFLOAD, LARGER),
  TEXT: (OFFLOAD, FEWER, LARGER),
  GIVEN: (OFFLOAD, TILING, FEWER, SMALLER, LARGER),
  DENOISE: (OFFLOAD, FEWER, SMALLER, SHARED, LARGER),
  DECODE: (OFFLOAD, TILING, FEWER, SMALLER, LARGER),
}


@contextmanager
def explained(phase: str, in_use: Collection[str]) -> Iterator[None]:
  """Has the user told what helps, should what runs inside run out of memory.

  Args:
    phase: of REMEDIES.
    in_use: remedies that are taken already.

  Raises:
    UserError: for XLA's RESOURCE_EXHAUSTED, as the program is compiled or run; it is the cause.
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
