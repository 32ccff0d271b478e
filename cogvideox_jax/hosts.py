"""Joins the processes of a job, one a host, lets them exchange data and wait for one another."""

import contextlib
import functools
import hashlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from cogvideox_jax.errors import UserError

NO_CLUSTER = "coordinator_address should be defined"  # JAX's error where there is no cluster.
FIRST_WORD = 8.0  # Seconds of waiting for other processes, after which a process says so.
# Seconds without a sign of life of a process, after which JAX aborts the others. It is longer than
# peers.SILENCE, so that they say why they end.
HEARTBEAT = 60
# One of these stands in the errors that JAX raises when another process of the job is gone.
SIGNS_OF_LOSS = ("Gloo", "oordination service", "heartbeat", "Connection closed by peer")
TEXT_BYTES = 1024  # Texts are exchanged in buffers of a multiple of this.
SLICE_BYTES = 2**26  # The most of an array that is gathered at once.


@dataclass(frozen=True)
class Group:
  """Where the processes of a job find one another."""

  # HOST:PORT of the first process; "": the machine knows it, or this process is alone.
  coordinator: str = ""
  count: int = 1  # Processes in the job.
  index: int = 0  # The number of this process, from 0.


def join(group: Group) -> None:
  """Connects this process to the others of the job. Call it before JAX looks at its devices.

  TPU pods, and the clusters that JAX knows, list their processes themselves. If neither they nor
  the group name any, this process is alone.

  Raises:
    UserError: the group is impossible, or its processes do not reach one another.
  """
  # Otherwise JAX catches SIGTERM itself, and the job would go on.
  jax.config.update("jax_enable_preemption_service", False)
  if group == Group():
    try:
      with _said("this process waits for the other processes of the job"):
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    except ValueError as error:
      # Any other error is an incomplete cluster, in which each process would do all the work alone.
      if NO_CLUSTER not in str(error):
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
    with _said(_waiting(group)):
      jax.distributed.initialize(
        group.coordinator,
        group.count,
        group.index,
        # Listen on this address only, because the coordinator asks for no password.
        coordinator_bind_address=group.coordinator,
        heartbeat_timeout_seconds=HEARTBEAT,
      )
  except (RuntimeError, ValueError) as error:
    reason = next(iter(str(error).splitlines()), "")[:300]
    raise UserError(
      f"the {group.count} processes do not meet at {group.coordinator}: {reason}\n"
      "Start all of them with the same --coordinator, HOST:PORT of process 0."
    ) from error


def _waiting(group: Group) -> str:
  """Returns what a process waits for while the processes of a job meet."""
  if group.index == 0:
    return f"process 0 waits at {group.coordinator} for the other {group.count - 1} processes"
  return f"process {group.index} cannot reach process 0 at {group.coordinator} yet, or others lack"


@contextlib.contextmanager
def _said(text: str) -> Iterator[None]:
  """Prints the text after FIRST_WORD seconds and then each minute, until the end."""
  ended, begun = threading.Event(), time.monotonic()

  def say() -> None:
    seconds = FIRST_WORD
    while not ended.wait(seconds):
      print(f"{text} ({time.monotonic() - begun:.0f} s)", file=sys.stderr, flush=True)
      seconds = 60.0

  thread = threading.Thread(target=say, name="waiting", daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()


def is_first() -> bool:
  """Returns whether this is the process that prints and writes for all."""
  return jax.process_index() == 0


def is_loss(error: BaseException) -> bool:
  """Returns whether an error says that another process of the job is gone."""
  return isinstance(error, (jax.errors.JaxRuntimeError, ValueError)) and any(
    sign in str(error) for sign in SIGNS_OF_LOSS
  )


def each(text: str) -> list[str]:
  """Returns the texts that the processes pass, in the order of processes, in every process."""
  if jax.process_count() == 1:
    return [text]
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(data))).reshape(-1)
  # Few lengths, because each length compiles a program.
  length = -(-max(int(sizes.max()), 1) // TEXT_BYTES) * TEXT_BYTES
  padded = np.zeros(length, np.uint8)
  padded[: len(data)] = data
  rows = multihost_utils.process_allgather(padded).reshape(-1, length)
  return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def check_same(what: str, text: str) -> None:
  """Raises a UserError, in every process, if one passes another text than the first process.

  Args:
    what: names what the text describes, for the message.
  """
  first, *others = each(hashlib.sha256(text.encode()).hexdigest())
  if odd := [index for index, digest in enumerate(others, 1) if digest != first]:
    raise UserError(
      f"process {odd[0]} of this job has another {what} than process 0.\n"
      "Start every process with the same command, of the same version of the code."
    )


def whole(array: jax.Array) -> np.ndarray | None:
  """Gathers an array, of which each process holds shards, in the memory of the first process.

  It goes slice by slice, so that a device never holds more of it than its shards and one slice.

  Returns:
    The array, in the first process and in every process that holds all of it; else None.
  """
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array.addressable_data(0) if array.is_fully_replicated else array)
  length = array.shape[0]
  size = min(length, max(1, length * SLICE_BYTES // array.nbytes))
  replicated = NamedSharding(cast(NamedSharding, array.sharding).mesh, PartitionSpec())
  gathered = np.empty(array.shape, array.dtype) if is_first() else None
  for start in range(0, length, size):
    start = min(start, length - size)
    rows = _gather_slice(array, start, size, replicated)
    if gathered is not None:
      gathered[start : start + size] = rows.addressable_data(0)
  return gathered


@functools.partial(jax.jit, static_argnames=("size", "replicated"))
def _gather_slice(array: jax.Array, start: int, size: int, replicated: NamedSharding) -> jax.Array:
  rows = jax.lax.dynamic_slice_in_dim(array, start, size)
  return jax.lax.with_sharding_constraint(rows, replicated)


def agree(flags: list[bool]) -> list[bool]:
  """Returns the flags of the first process, in every process."""
  numbers = multihost_utils.broadcast_one_to_all(np.array(flags, np.int32))
  return np.asarray(numbers).astype(bool).tolist()


def wait(name: str) -> None:
  """Returns once every process has called it with the same name."""
  multihost_utils.sync_global_devices(name)
