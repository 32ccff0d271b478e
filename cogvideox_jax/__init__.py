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
  from cogvideox_jax.inference.pipeline import Pipeline
  from cogvideox_jax.training.workdir import load

__all__ = ["Pipeline", "__version__", "load"]

_HOMES = {
  "Pipeline": "cogvideox_jax.inference.pipeline",
  "load": "cogvideox_jax.training.workdir",
}


# `python -m cogvideox_jax.NAME`: a signal may come while the command's libraries load.
if sys.argv[:1] == ["-m"] and any(
  re.fullmatch(r"cogvideox_jax\.\w+", arg) for arg in sys.orig_argv
):
  leave_on_signals()


def __getattr__(name: str):
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_HOMES[name]), name)
