"""One run writes to a folder: a second one hears who does, and a dead one's lock is taken over."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import typing

import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from waiting import wait_until

from cogvideox_jax.data import drafts, locks
from cogvideox_jax.data.files import new_draft, remove_drafts, write_atomically, write_whole
from cogvideox_jax.errors import UserError
from cogvideox_jax.exclusive import exclusive

HOLDER = {"host": "elsewhere", "pid": 7, "since": "2026-01-02 03:04:05 UTC"}


@pytest.fixture
def folder(tmp_path):
  return epath.Path(tmp_path) / "run"


@pytest.fixture
def hasty(monkeypatch):
  """Objects are taken for dead soon."""
  for name, seconds in (("BEAT", 0.02), ("PATIENCE", 1.0), ("SETTLE", 0.01)):
    monkeypatch.setattr(locks, name, seconds)


def test_a_second_run_hears_who_holds_a_folder_and_gets_it_afterwards(folder):
  with exclusive(folder):
    with pytest.raises(UserError) as told, exclusive(folder):
      pass
    for word in (str(folder), socket.gethostname(), str(os.getpid()), time.strftime("%Y-")):
      assert word in str(told.value)
  assert not folder.exists()  # It is empty, and was made for the run.
  with exclusive(folder) as check:
    check()
    (folder / "x").write_text("kept")
  assert [path.name for path in folder.iterdir()] == ["x"]


HOLD = """
import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
os.write(file, sys.argv[2].encode())
print(flush=True)
time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_taken_over(folder):
  folder.mkdir()
  command = [sys.executable, "-S", "-c", HOLD, str(folder / locks.NAME), json.dumps(HOLDER)]
  with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
    assert process.stdout and process.stdout.readline()
    with pytest.raises(UserError, match=r"process 7 on elsewhere, since 2026-01-02 03:04:05 UTC"):
      locks.take(folder)
    process.send_signal(signal.SIGKILL)
  locks.take(folder).release()


def test_a_run_notices_that_its_folder_was_removed_and_locks_again_if_its_file_was(folder):
  lock = locks.take(folder)
  (folder / locks.NAME).unlink()
  lock.check()
  with pytest.raises(UserError, match="in use"):
    locks.take(folder)
  folder.rmtree()
  with pytest.raises(UserError, match="removed or renamed"):
    lock.check()
  lock.release()


def test_a_lock_is_not_written_through_a_link(folder, tmp_path):
  folder.mkdir()
  (tmp_path / "other").write_text("theirs")
  os.symlink(tmp_path / "other", folder / locks.NAME)
  with pytest.raises(UserError, match="link"):
    locks.take(folder)
  assert (tmp_path / "other").read_text() == "theirs"


def test_without_locks_of_the_system_an_object_with_a_generation_is_the_lock(
  folder, hasty, monkeypatch
):
  monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(95, "no locks")))
  lock = locks.take(folder)
  with pytest.raises(UserError, match=f"process {os.getpid()} on "):
    locks.take(folder)
  assert json.loads((folder / locks.NAME).read_text())["generation"] == 1
  lock.check()
  lock.release()
  assert not (folder / locks.NAME).exists()


def test_an_object_that_stands_still_is_taken_over_and_its_holder_then_stops(folder, hasty):
  folder.mkdir()
  path = folder / locks.NAME
  path.write_text(json.dumps({**HOLDER, "generation": 4, "token": "dead", "beats": 9}))
  lock = locks.ObjectLock(path)
  assert json.loads(path.read_text())["generation"] == 5
  path.write_text(json.dumps({**HOLDER, "generation": 6, "token": "other", "beats": 0}))
  lock._thread.join()
  with pytest.raises(UserError, match="taken over by another run"):
    lock.check()
  lock.release()
  assert json.loads(path.read_text())["token"] == "other"


class Bucket(MemoryFileSystem):
  """Objects by name, without links, locks and renames, where the package of a bucket would be."""

  protocol = ("gs", "gcs")
  store: typing.ClassVar = {}
  pseudo_dirs: typing.ClassVar = [""]

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.removeprefix("gs://"))


@pytest.fixture
def bucket(monkeypatch):
  """A folder of a bucket."""
  monkeypatch.setitem(_registry, "gcs", Bucket)  # The name by which epath asks for it.
  Bucket.store.clear()
  return epath.Path("gs://bucket/run")


def test_a_bucket_is_locked_by_an_object_whose_generation_rises(bucket, hasty):
  path = bucket / locks.NAME
  with exclusive(bucket) as check:
    held = json.loads(path.read_text())
    assert held["generation"] == 1 and held["pid"] == os.getpid()
    with pytest.raises(UserError, match=f"process {os.getpid()} on "), exclusive(bucket):
      pass
    check()
    assert json.loads(path.read_text())["beats"] > held["beats"]
  assert not path.exists()
  path.write_text(json.dumps({**HOLDER, "generation": 7, "token": "dead", "beats": 3}))
  with exclusive(bucket) as check:  # It stands still, and is taken over.
    assert json.loads(path.read_text())["generation"] == 8
    other = {**HOLDER, "generation": 9, "token": "other", "beats": 0}
    path.write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"taken over .*\n?.*process 7 on elsewhere"):
      wait_until(check)
  assert json.loads(path.read_text()) == other  # What is another's is not removed.


def test_drafts_have_names_of_their_own_and_go_with_an_error(tmp_path):
  path = epath.Path(tmp_path) / "x.json"
  for write in (write_atomically, write_whole):
    write(path, b"new")
    assert path.read_bytes() == b"new"
  mask = os.umask(0o027)
  write_whole(path, b"private")
  os.umask(mask)
  assert path.stat().mode & 0o777 == 0o640
  draft = new_draft(path)
  assert draft.parent == path.parent
  theirs = path.with_name(".x.json.mine.partial")
  theirs.write_text("theirs")
  remove_drafts(path)
  assert not draft.exists() and theirs.exists()
  theirs.unlink()
  with pytest.raises(IsADirectoryError):
    write_whole(epath.Path(tmp_path), b"")
  assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_folder_appears_whole_and_nothing_of_others_is_touched(tmp_path):
  root = epath.Path(tmp_path)
  theirs = [root / "zz.partial", root / ".zz.mine.partial", root / ".zz.link.partial"]
  for path in theirs[:2]:
    path.mkdir()
    (path / "x").write_text("theirs")
  os.symlink(theirs[0], theirs[2])
  abandoned = root / ".zz.1.partial"
  locks.take(abandoned)._path.exists()  # As a killed run leaves it, once nobody locks it.
  locks.take(root / ".zz.2.partial").release()
  with drafts.folder_beside(root / "zz") as draft:
    assert draft.name == "zz" and draft.parent.parent == root
    (draft / "x").write_text("ours")
    draft.rename(root / "zz")
  assert (root / "zz" / "x").read_text() == "ours"
  for path in theirs:
    assert (path / "x").read_text() == "theirs"
  with pytest.raises(KeyError), drafts.folder_beside(root / "zz"):
    raise KeyError
  assert not list(root.glob(".zz.t*"))
