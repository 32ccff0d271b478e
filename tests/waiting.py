"""How tests wait for what other processes and threads do: as long as it takes, and no longer."""

import time
from collections.abc import Callable

PATIENCE = 1200  # Seconds, because the machine may have much else to do.


def wait_until(is_so: Callable[[], object], *, runs: Callable[[], object] = lambda: True) -> None:
  """Returns once something is so; fails where what should bring it about runs no more."""
  deadline = time.monotonic() + PATIENCE
  while not is_so():
    assert runs() and time.monotonic() < deadline
    time.sleep(0.01)
