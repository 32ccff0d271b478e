"""Keeps compiled programs on the disk, so that a later start of a command need not compile them.

JAX names an entry by a digest of the program, the options of the compiler, the versions of jaxlib
and of the device's libraries, and the devices. So a program that changed is compiled, and never
taken from here. Programs of a CPU also depend on what its cores can do, by which the folder is
chosen.
"""

import hashlib
import os
import platform
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from cogvideox_jax import paths
from cogvideox_jax.errors import UserError

OFF = "off"
FOLDER = "programs"
VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # JAX's own.
_SETTINGS = {
  "jax_persistent_cache_min_compile_time_secs": 0.05,  # What compiles sooner is not kept.
  "jax_persistent_cache_min_entry_size_bytes": -1,
}


def keep(given: str, shared: str = "") -> None:
  """Keeps the programs that are compiled from now on, and looks for them there first.

  Args:
    given: a folder or bucket, made if it is not there; "off": programs are not kept; empty: where
      JAX_COMPILATION_CACHE_DIR says, or else in `shared` or the user's cache. If the user's cache
      cannot be written, programs are not kept.
    shared: a folder that all processes of a job see, in which case the first one writes for all.

  Raises:
    UserError: the folder that is given cannot be written.
  """
  if given == OFF:
    jax.config.update("jax_enable_compilation_cache", False)
    return
  if not given and os.environ.get(VARIABLE):
    return
  home = given or os.path.join(shared or paths.user_cache(), FOLDER)
  if not _is_writable(home):
    if given:
      raise UserError(
        f"--compilation_cache={given} cannot be written.\nGive another folder, or off."
      )
    return
  jax.config.update("jax_compilation_cache_dir", os.path.join(home, _cores()))
  for name, value in _SETTINGS.items():
    if name.upper() not in os.environ:
      jax.config.update(name, value)
  compilation_cache.reset_cache()  # JAX reads the settings once, when it first compiles.


def _is_writable(folder: str) -> bool:
  """Returns whether a folder, which is made, can be written; of a bucket it is not known."""
  if paths.is_address(folder):
    return True
  try:
    os.makedirs(folder, exist_ok=True)
  except OSError:
    return False
  return os.access(folder, os.W_OK | os.X_OK)


def _cores() -> str:
  """Returns a name for what the cores of this machine can do."""
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
  except OSError:  # Not Linux.
    found = [platform.processor()]
  words = "\n".join([platform.machine(), *found])
  return hashlib.sha256(words.encode()).hexdigest()[:16]
