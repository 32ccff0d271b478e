"""Progress bars of a long call: named phases with rate and ETA; compile time is counted apart."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from tqdm import tqdm

COMPILE = "compile"  # The phase to which the compile time of all phases is added.
_COMPILE_EVENTS = (
  "/jax/core/compile/jaxpr_to_mlir_module_duration",
  "/jax/core/compile/backend_compile_duration",
)


class Progress:
  """Bars on stderr, one for each phase; only process 0 shows them.

  `seconds` sums the time of each phase, without compilation, which is counted as `compile`.
  """

  def __init__(self, show: bool = True):
    self._hide = not show or jax.process_index() != 0
    self.seconds: dict[str, float] = defaultdict(float)

  @contextmanager
  def phase(self, name: str, total: int = 1) -> Iterator[tqdm]:
    """Times and shows a phase of `total` equal units; the caller updates the bar it yields."""
    compiling = 0.0

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
      nonlocal compiling
      compiling += duration_secs if event in _COMPILE_EVENTS else 0.0

    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.perf_counter()
    try:
      with tqdm(desc=f"{name:8}", total=total, disable=self._hide, leave=True) as bar:
        yield bar
        if compiling and name != COMPILE:
          bar.set_postfix_str(f"of which compiling {compiling:.1f}s")
    finally:
      jax.monitoring.unregister_event_duration_listener(listen)
      if name != COMPILE:  # That phase is all compilation, tracing included.
        self.seconds[COMPILE] += compiling
        start += compiling
      self.seconds[name] += time.perf_counter() - start
