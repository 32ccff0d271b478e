"""One process a host, for jobs whose hosts share their work: who there is, and waiting for them."""

from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from cogvideox_jax.errors import UserError

NO_CLUSTER = "coordinator_address should be defined"  # How JAX says that there is none.
HEARTBEAT = 30  # Seconds without a sign of life after which JAX ends the others.


class Group(NamedTuple):
  """Where the processes of a job find one another."""

  coordinator: str = ""  # HOST:PORT of the first one; "": the machine knows, or there is but one.
  count: int = 1
  index: int = 0  # Of this process, from 0.


def join(group: Group) -> None:
  """Meets the other processes of the job. Call it before JAX looks at its devices.

  TPU pods, and the clusters that JAX knows, say themselves who there is. Where nothing does, this
  process is alone. Raises UserError if the group cannot be, or does not meet.
  """
  # JAX would take SIGTERM for itself, and go on.
  jax.config.update("jax_enable_preemption_service", False)
  if group == Group():
    try:
      jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    except ValueError as error:
      if NO_CLUSTER not in str(error):  # Half a cluster: alone, each would do all the work.
        raise UserError(
          f"the processes of this job do not know one another: {error}\n"
          "Give each the same --coordinator and --process_count, and its own --process_id."
        ) from error
    return
  if not group.coordinator or not 0 <= group.index < group.count:
    raise UserError(
      f"there is no process {group.index} of {group.count} at {group.coordinator!r}.\n"
      "Give each process the same --coordinator, HOST:PORT of the first one, and the same\n"
      "--process_count=N, and its own --process_id from 0 to N-1."
    )
  try:
    jax.distributed.initialize(
      group.coordinator,
      group.count,
      group.index,
      coordinator_bind_address=group.coordinator,  # Nobody else's business: it asks no password.
      heartbeat_timeout_seconds=HEARTBEAT,
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f"the {group.count} processes do not meet at {group.coordinator}: {error}\n"
      "Start all of them with the same --coordinator, HOST:PORT of process 0."
    ) from error


def agree(flags: list[bool]) -> list[bool]:
  """The first process's flags, in every process."""
  numbers = multihost_utils.broadcast_one_to_all(np.array(flags, np.int32))
  return np.asarray(numbers).astype(bool).tolist()


def wait(name: str) -> None:
  """Returns once every process is here."""
  multihost_utils.sync_global_devices(name)
