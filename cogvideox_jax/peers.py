"""Watches the other processes of a job, so that none waits for one that is dead or stopped.

Every process tells JAX's coordinator every few seconds that it lives and what it does. A process
that sees no sign of life of another one for SILENCE seconds says so in a few lines and ends with
PEER_DIED, before JAX would abort it.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax._src import distributed  # The only way to JAX's own store of keys and values.
from jax.errors import JaxRuntimeError

from cogvideox_jax.errors import PEER_DIED

INTERVAL = 3.0  # Seconds between two signs of life.
SILENCE = 30.0  # Seconds without one, after which a process counts as gone.
FOLDER = "cogvideox_jax/alive/"


class Sign(NamedTuple):
  """A sign of life of a process."""

  number: int  # How many there were.
  host: str
  doing: str  # What the process does; empty: not known.
  ended: bool = False  # Whether the process has finished its work.


class Peers:
  """The signs of life of all processes of a job."""

  def __init__(
    self,
    client: Any,
    index: int,
    count: int,
    *,
    leave: Callable[[int], object] = os._exit,
    interval: float = INTERVAL,
    silence: float = SILENCE,
  ):
    """Takes the client of JAX's coordinator, the number of this process, and how many there are."""
    self.doing = ""  # What this process does, for the messages of others.
    self._client, self._index, self._leave = client, index, leave
    self._interval, self._silence = interval, silence
    self._ended = threading.Event()
    begun = time.monotonic()
    self._seen = dict.fromkeys(set(range(count)) - {index}, begun)
    self._signs = {other: Sign(0, "", "") for other in self._seen}
    self._answered = begun
    self._number = 0
    self._threads = [
      threading.Thread(target=work, name="peers", daemon=True) for work in (self._tell, self._watch)
    ]

  def start(self) -> None:
    """Starts to tell and to watch."""
    for thread in self._threads:
      thread.start()

  def end(self) -> None:
    """Tells the others that this process has finished, so that its silence means nothing."""
    self._ended.set()
    self._give(ended=True)

  def others(self) -> list[str]:
    """Describes what the other processes do, a line each."""
    return [self._describe(other) for other in sorted(self._signs)]

  def _tell(self) -> None:
    """Gives signs of life and takes those of others. The coordinator may keep it waiting."""
    while not self._ended.wait(self._interval):
      try:
        self._give()
        self._take()
      except JaxRuntimeError:  # The coordinator does not answer, which `_watch` notices.
        continue

  def _give(self, *, ended: bool = False) -> None:
    self._number += 1
    sign = Sign(self._number, socket.gethostname(), self.doing, ended)
    self._client.key_value_set(
      f"{FOLDER}{self._index}", json.dumps(sign._asdict()), allow_overwrite=True
    )

  def _take(self) -> None:
    found = self._client.key_value_dir_get(FOLDER)
    self._answered = now = time.monotonic()
    for key, text in found:
      other = int(key.rsplit("/", 1)[-1])
      if other in self._signs and self._signs[other] != (sign := Sign(**json.loads(text))):
        self._signs[other], self._seen[other] = sign, now

  def _watch(self) -> None:
    """Ends this process once another one is silent."""
    last = time.monotonic()
    while not self._ended.wait(self._interval):
      now = time.monotonic()
      if now - last > self._silence / 2:  # This process was stopped itself.
        self._answered = now
        self._seen = dict.fromkeys(self._seen, now)
      last = now
      if silent := self._silent(now):
        self._say(silent)
        self._leave(PEER_DIED)
        return

  def _silent(self, now: float) -> list[str]:
    """Describes the processes that are silent."""
    if now - self._answered > self._silence:
      return [
        f"The coordinator of this job, in process 0, has not answered for {self._silence:g} s."
      ]
    return [
      f"{self._describe(other)}: no sign of life for {self._silence:g} s."
      for other, seen in sorted(self._seen.items())
      if now - seen > self._silence and not self._signs[other].ended
    ]

  def _describe(self, other: int) -> str:
    sign = self._signs[other]
    host = f" on {sign.host}" if sign.host else ""
    return f"Process {other}{host}" + (f", {sign.doing}" if sign.doing else "")

  def _say(self, silent: list[str]) -> None:
    sys.stdout.flush()
    print(
      *silent,
      "This process ends, so that the job can start anew. The same command on every host goes on "
      "from what was saved last.",
      sep="\n",
      file=sys.stderr,
      flush=True,
    )


_watched: list[Peers] = []  # At most one: those of the job that this process belongs to.


def watch() -> Peers | None:
  """Starts to watch the other processes of the job, if there are any."""
  client = distributed.global_state.client
  if jax.process_count() == 1 or client is None:
    return None
  _watched[:] = [Peers(client, jax.process_index(), jax.process_count())]
  _watched[0].start()
  return _watched[0]


def tell(doing: str) -> None:
  """Tells the other processes what this one does, such as `in step 3 (data)`."""
  for one in _watched:
    one.doing = doing


def others() -> list[str]:
  """Describes what the other processes do, a line each; nothing if this process is alone."""
  return [line for one in _watched for line in one.others()]
