"""One process a host, for jobs whose hosts share their work: who there is, and waiting for them."""

import functools
import hashlib
from dataclasses import dataclass
from typing import cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from cogvideox_jax.errors import UserError

NO_CLUSTER = "coordinator_address should be defined"  # How JAX says that there is none.
HEARTBEAT = 30  # Seconds without a sign of life after which JAX ends the others.
# What JAX says in a process that still runs when it finds another gone.
SIGNS_OF_LOSS = ("Gloo", "oordination service", "heartbeat", "Connection closed by peer")
TEXT_ROOM = 1024  # Bytes.
PIECE = 2**26  # Bytes, of an array that is brought together.


@dataclass(frozen=True)
class Group:
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


def is_first() -> bool:
  """Whether this is the process that speaks and writes for all."""
  return jax.process_index() == 0


def is_loss(error: BaseException) -> bool:
  """Whether an error says that another process of the job is gone."""
  return isinstance(error, (jax.errors.JaxRuntimeError, ValueError)) and any(
    sign in str(error) for sign in SIGNS_OF_LOSS
  )


def each(text: str) -> list[str]:
  """What every process gives, in all of them, in their order."""
  if jax.process_count() == 1:
    return [text]
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(data))).reshape(-1)
  room = -(-max(int(sizes.max()), 1) // TEXT_ROOM) * TEXT_ROOM  # So that few programs are compiled.
  padded = np.zeros(room, np.uint8)
  padded[: len(data)] = data
  rows = multihost_utils.process_allgather(padded).reshape(-1, room)
  return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def check_same(what: str, text: str) -> None:
  """Raises a UserError, in all processes alike, if one was given another text than the first.

  what: the name of it, for the message.
  """
  first, *others = each(hashlib.sha256(text.encode()).hexdigest())
  if odd := [index for index, digest in enumerate(others, 1) if digest != first]:
    raise UserError(
      f"process {odd[0]} of this job has another {what} than process 0.\n"
      "Start every process with the same command, of the same version of the code."
    )


def whole(array: jax.Array) -> np.ndarray | None:
  """An array that the processes hold parts of, in the memory of the first; None in the others.

  It goes by way of each device's memory, a piece after the other.
  """
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array.addressable_data(0) if array.is_fully_replicated else array)
  length = array.shape[0]
  size = min(length, max(1, length * PIECE // array.nbytes))
  place = NamedSharding(cast(NamedSharding, array.sharding).mesh, PartitionSpec())
  found = np.empty(array.shape, array.dtype) if is_first() else None
  for start in range(0, length, size):
    start = min(start, length - size)
    piece = _piece(array, start, size, place)
    if found is not None:
      found[start : start + size] = piece.addressable_data(0)
  return found


@functools.partial(jax.jit, static_argnames=("size", "place"))
def _piece(array: jax.Array, start: int, size: int, place: NamedSharding) -> jax.Array:
  piece = jax.lax.dynamic_slice_in_dim(array, start, size)
  return jax.lax.with_sharding_constraint(piece, place)


def agree(flags: list[bool]) -> list[bool]:
  """The first process's flags, in every process."""
  numbers = multihost_utils.broadcast_one_to_all(np.array(flags, np.int32))
  return np.asarray(numbers).astype(bool).tolist()


def wait(name: str) -> None:
  """Returns once every process is here."""
  multihost_utils.sync_global_devices(name)
