"""Opens JAX's devices, and says in one message why there are none."""

import contextlib
import glob
import os
import sys
import tempfile
from collections.abc import Iterator

import jax

from cogvideox_jax.errors import UserError


def open_devices() -> None:
  """Makes JAX look for its devices. In a job of several processes, call it once they have met.

  On a machine without a TPU, what libtpu prints about that is dropped.

  Raises:
    UserError: there is no device of the kind that JAX_PLATFORMS names.
  """
  try:
    with contextlib.nullcontext() if _may_have_tpu() else _dropped_errors():
      jax.devices()
  except (RuntimeError, AssertionError) as error:  # JAX asserts that it knows the name.
    wanted = os.environ.get("JAX_PLATFORMS") or "any"
    raise UserError(
      f"JAX_PLATFORMS={wanted}: there is no such device here ({_reason(str(error))}).\n"
      "Unset JAX_PLATFORMS to use what the machine has, or set it to cpu.\n"
      "For GPUs install the extra: pip install 'cogvideox-jax[gpu]'; for TPUs, [tpu]."
    ) from error


def _reason(text: str) -> str:
  """Returns why there is no device, in a few words.

  libtpu advises to remove its lock as root, which would let two processes use one TPU.
  """
  if not text:
    return "JAX does not know it, or its plugin is missing"
  if "lockfile" in text:
    return "another process uses libtpu, or it belongs to another user"
  return text.splitlines()[0].split(" (set JAX_PLATFORMS")[0][:200]


def _may_have_tpu() -> bool:
  """Returns whether there are device files as of TPUs, so that libtpu's words matter."""
  return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*"))


@contextlib.contextmanager
def _dropped_errors() -> Iterator[None]:
  """Drops what is written to standard error, also by libraries in C++."""
  sys.stderr.flush()
  kept = os.dup(2)
  try:
    with tempfile.TemporaryFile() as file:
      os.dup2(file.fileno(), 2)
      yield
      sys.stderr.flush()
  finally:
    os.dup2(kept, 2)
    os.close(kept)
