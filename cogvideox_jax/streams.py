"""Keeps a command running when nobody reads what it prints any more."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

# The reader of a pipe has ended; the terminal is gone.
_DEAD = (errno.EPIPE, errno.EIO)


@contextlib.contextmanager
def lasting() -> Iterator[None]:
  """While entered, standard output and error that nobody reads any more swallow what is printed."""
  before = sys.stdout, sys.stderr
  sys.stdout, sys.stderr = (_Lasting(stream) for stream in before)
  try:
    yield
  finally:
    for stream in (sys.stdout, sys.stderr):
      stream.flush()
    sys.stdout, sys.stderr = before


class _Lasting:
  """A text stream that goes to nowhere once it is dead. It is the stream itself otherwise."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> int:
    try:
      return self._stream.write(text)
    except OSError as error:
      self._silence(error)
      return len(text)

  def flush(self) -> None:
    try:
      self._stream.flush()
    except OSError as error:
      self._silence(error)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def _silence(self, error: OSError) -> None:
    """Leads the stream to nowhere; raises the error if it is another one."""
    if error.errno not in _DEAD:
      raise error
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, self._stream.fileno())
    os.close(nowhere)
