"""Runs a command as one job on several hosts: connects their processes, and ends them together.

A command that imports this module calls `declare_flags`, so that its --help lists the flags below.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import jax
from absl import flags

from cogvideox_jax import command, hosts, peers
from cogvideox_jax.devices import open_devices
from cogvideox_jax.errors import PEER_DIED

COORDINATOR = flags.DEFINE_string(
  "coordinator", "", "HOST:PORT of process 0, where the processes of a job meet."
)
PROCESS_COUNT = flags.DEFINE_integer(
  "process_count", 1, "How many processes the job has.", lower_bound=1
)
PROCESS_ID = flags.DEFINE_integer(
  "process_id", 0, "The number of this process, from 0.", lower_bound=0
)


def declare_flags() -> None:
  """Lists the flags of a job in the --help of the command that calls this function."""
  for name in ("coordinator", "process_count", "process_id"):
    flags.declare_key_flag(name)


@contextlib.contextmanager
def joined(folder: str = "") -> Iterator[None]:
  """Makes this process part of the job that the flags, or the machine, describe.

  Several processes keep compiled programs in the job's folder, if it has one: all see it.

  A process that fails exits at once, with the exit code that it would have alone. Python's own exit
  would wait for the other processes, which wait for this one. They then exit with PEER_DIED, as
  they do if a process is stopped or its host dies (peers.py).
  """
  hosts.join(hosts.Group(COORDINATOR.value, PROCESS_COUNT.value, PROCESS_ID.value))
  open_devices()
  if folder and jax.process_count() > 1:
    command.share_programs(folder)
  watched = peers.watch()
  try:
    with command.user_mistakes():
      yield
    if watched:
      watched.end()
  except BaseException as error:
    if jax.process_count() == 1:
      raise
    code = _report(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report(error: BaseException) -> int:
  """Prints a failure that command.user_mistakes has not printed, and returns the exit code."""
  if isinstance(error, SystemExit) and isinstance(error.code, int):
    return error.code
  if hosts.is_loss(error):
    print(
      f"Another process of the job is gone: {str(error).splitlines()[0][:200]}\n"
      "Its own output says why. The same command on every host goes on from what was saved last.",
      file=sys.stderr,
    )
    return PEER_DIED
  traceback.print_exception(error)
  return 1


flags.disclaim_key_flags()
