"""CogVideoX (arXiv:2408.06072) in JAX.

Names are looked up on first use (PEP 562), so that a process that decodes video and imports
`cogvideox_jax.data.video` does not load the models.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from cogvideox_jax.inference.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__"]

_HOMES = {"Pipeline": "cogvideox_jax.inference.pipeline"}


def __getattr__(name: str):
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_HOMES[name]), name)
