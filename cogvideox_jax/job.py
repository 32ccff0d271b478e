"""A command that several hosts run together: how they meet, and how one leaves the others.

A command that imports it declares its flags as its own (`declare_flags`), for its --help.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import jax
from absl import flags

from cogvideox_jax import command, hosts
from cogvideox_jax.errors import PEER_DIED

COORDINATOR = flags.DEFINE_string(
  "coordinator", "", "HOST:PORT of process 0, where the processes of a job meet."
)
PROCESS_COUNT = flags.DEFINE_integer("process_count", 1, "Of the job.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", 0, "This one's, from 0.", lower_bound=0)


def declare_flags() -> None:
  """Lists them in the --help of the command that calls this."""
  for name in ("coordinator", "process_count", "process_id"):
    flags.declare_key_flag(name)


@contextlib.contextmanager
def joined() -> Iterator[None]:
  """While entered, this process is one of the job that the flags, or the machine, tell of.

  A process that fails leaves at once, with the exit code that it has alone: Python's own end would
  wait for the others, who wait for it. They then leave with PEER_DIED, or JAX ends them.
  """
  hosts.join(hosts.Group(COORDINATOR.value, PROCESS_COUNT.value, PROCESS_ID.value))
  try:
    with command.user_mistakes():
      yield
  except BaseException as error:
    if jax.process_count() == 1:
      raise
    code = _say(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say(error: BaseException) -> int:
  """Tells of a failure that command.user_mistakes has not told of. Returns the exit code."""
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
