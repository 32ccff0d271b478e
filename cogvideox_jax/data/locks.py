"""Locks a folder for the one run that writes to it.

The system locks files on disks and on network file systems that support it: it gives the lock free
when the process ends, however that comes. In a bucket, and on file systems without locks, the lock
is an object with a generation: its holder counts it up every few seconds, and one that stands still
is taken over under the next generation.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from typing import Any

from etils import epath

from cogvideox_jax.data.files import disk_errors, write_whole
from cogvideox_jax.errors import UserError
from cogvideox_jax.paths import is_address

NAME = ".lock"
BEAT = 10.0  # Seconds from one sign of life of the holder of an object to the next.
PATIENCE = 4 * BEAT  # Seconds without one, after which the holder is taken for dead.
SETTLE = 2.0  # Seconds after which two that took an object at once see the same one.
_UNSUPPORTED = {errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}


def take(folder: epath.Path) -> "FileLock | ObjectLock":
  """Locks a folder, which is made if it is not there.

  Raises:
    UserError: another run holds it; the message names its host, process and start. Or the folder
      cannot be written to.
  """
  path = folder / NAME
  with disk_errors(folder):
    folder.mkdir(parents=True, exist_ok=True)
    if is_address(os.fspath(folder)):
      return ObjectLock(path)
    try:
      return FileLock(path)
    except OSError as error:
      if error.errno not in _UNSUPPORTED:
        raise
    return ObjectLock(path)


class FileLock:
  """A lock of the operating system on a file, which names the holder."""

  def __init__(self, path: epath.Path):
    self._path, self._folder = path, os.stat(path.parent)
    self._take()

  def check(self) -> None:
    """Raises a UserError if the folder was removed. Locks again if only the file was."""
    folder = self._path.parent
    if not folder.exists() or not os.path.samestat(self._folder, os.stat(folder)):
      raise UserError(
        f"{folder} was removed or renamed while this run wrote to it.\n"
        "Put it back, and the same command goes on from its newest checkpoint."
      )
    if not (self._path.exists() and os.path.samestat(os.fstat(self._file), os.stat(self._path))):
      os.close(self._file)
      self._take()

  def release(self) -> None:
    """Gives the folder free."""
    self._path.unlink(missing_ok=True)
    os.close(self._file)

  def _take(self) -> None:
    self._file = self._open()
    os.truncate(self._file, 0)
    os.write(self._file, json.dumps(_holder()).encode())

  def _open(self) -> int:
    while True:
      file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A holder removes its file at its end. A lock on a removed file locks nothing.
        if os.path.exists(self._path) and os.path.samestat(os.fstat(file), os.stat(self._path)):
          return file
      except BlockingIOError as error:
        os.close(file)
        raise _in_use(self._path, _read(self._path)) from error
      except OSError:
        os.close(file)
        raise
      os.close(file)


class ObjectLock:
  """A lock that is an object: its holder's name, a generation, and a count of signs of life."""

  def __init__(self, path: epath.Path):
    self._path = path
    before = self._wait_for_signs_of_life()
    self._held = {
      **_holder(),
      "generation": before.get("generation", 0) + 1,
      "token": uuid.uuid4().hex,
      "beats": 0,
    }
    self._write()
    time.sleep(SETTLE)
    if not self._is_ours():
      raise _in_use(path, _read(path))
    self._lost, self._ended = False, threading.Event()
    self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Raises a UserError if another run has taken the folder over."""
    if self._lost:
      raise UserError(
        f"{self._path.parent} was taken over by another run, because this one gave no sign of life "
        f"for {PATIENCE:.0f} s:\n{_name(_read(self._path))}.\nThis run ends without saving."
      )

  def release(self) -> None:
    """Gives the folder free."""
    self._ended.set()
    self._thread.join()
    if self._is_ours():
      self._path.unlink(missing_ok=True)

  def _wait_for_signs_of_life(self) -> dict[str, Any]:
    """Returns what a dead holder left; a UserError if the holder lives."""
    found = before = _read(self._path)
    deadline = time.monotonic() + PATIENCE
    while found and time.monotonic() < deadline:
      time.sleep(PATIENCE / 8)
      found = _read(self._path)
      if found and found != before:
        raise _in_use(self._path, found)
    return before

  def _beat(self) -> None:
    while not self._ended.wait(BEAT):
      if not self._is_ours():
        self._lost = True
        return
      self._held["beats"] += 1
      self._write()

  def _write(self) -> None:
    text = json.dumps(self._held)
    if is_address(os.fspath(self._path)):
      self._path.write_text(text)  # An object appears whole.
    else:
      write_whole(self._path, text.encode())

  def _is_ours(self) -> bool:
    return _read(self._path).get("token") == self._held["token"]


def _holder() -> dict[str, Any]:
  since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
  return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _read(path: epath.Path) -> dict[str, Any]:
  """Returns what a lock says; empty if it is not there, or is just being written."""
  try:
    found = json.loads(path.read_text())
  except (FileNotFoundError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def _name(holder: dict[str, Any]) -> str:
  if not {"host", "pid", "since"} <= holder.keys():
    return "another process"
  return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"


def _in_use(path: epath.Path, holder: dict[str, Any]) -> UserError:
  return UserError(
    f"{path.parent} is in use by {_name(holder)}.\n"
    "Wait until it ends, or stop it, or choose another folder."
  )
