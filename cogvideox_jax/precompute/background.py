"""Runs calls one after another in a thread beside the caller."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Background:
  """A thread that runs calls in their order, and may be a few of them behind.

  Use it in a `with` statement: leaving it waits for all calls, or drops those that have not begun
  if an exception leaves it.
  """

  def __init__(self, most_waiting: int):
    """most_waiting: how many calls may wait or run when `do` returns."""
    self._thread = ThreadPoolExecutor(1, "write")
    self._most_waiting = most_waiting
    self._waiting: deque[Future] = deque()

  def __enter__(self) -> "Background":
    return self

  def __exit__(self, fault: type[BaseException] | None, *_: object) -> None:
    try:
      if not fault:
        self._wait(0)
    finally:
      self._thread.shutdown(cancel_futures=True)

  def do(self, function: Callable[..., None], *args: Any) -> None:
    """Adds a call. Raises what an earlier call raised."""
    self._waiting.append(self._thread.submit(function, *args))
    self._wait(self._most_waiting)

  def _wait(self, behind: int) -> None:
    while len(self._waiting) > behind:
      self._waiting.popleft().result()
