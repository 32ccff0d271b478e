"""Stops all processes of a job after the same step, when one of them gets a signal."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cogvideox_jax.interrupts import Interrupts


class Stopping:
  """Asks all processes before each step, and reads the answer while the step runs.

  The devices compute the answer between two steps, so they never wait for a host; hosts run one
  step ahead of them. A process that is alone asks nobody.
  """

  def __init__(self, interrupts: Interrupts, mesh: Mesh):
    self.exit_code: int | None = None  # The code to exit with, once it is time to stop.
    self._interrupts, self._alone = interrupts, jax.process_count() == 1
    self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    self._codes: dict[int, jax.Array] = {}  # Exit code -> array with it on all devices.
    # On CPU, programs that run at the same time on many devices can deadlock.
    self._waits = mesh.devices.flat[0].platform == "cpu"
    self._answer: jax.Array | None = None

  def ask(self) -> None:
    """Asks whether a process got a signal. Every process calls it before each step."""
    if not self._alone:
      self._answer = self._largest(self._code(self._interrupts.exit_code or 0))
      if self._waits:
        jax.block_until_ready(self._answer)

  def is_due(self) -> bool:
    """Returns whether to stop after the step that is under way."""
    self.exit_code = (
      self._interrupts.exit_code if self._answer is None else int(self._answer) or None
    )
    return self.exit_code is not None

  def _code(self, code: int) -> jax.Array:
    """Returns an array with this process's exit code, or 0, on each of its devices."""
    if code not in self._codes:
      count = self._each.mesh.size
      self._codes[code] = jax.make_array_from_callback(
        (count,), self._each, lambda _: np.array([code], np.int32)
      )
    return self._codes[code]
