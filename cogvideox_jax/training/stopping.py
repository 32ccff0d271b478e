"""When to stop for a signal: after the same step in every process of a job, whoever was told."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cogvideox_jax.interrupts import Interrupts


class Stopping:
  """Asks all processes before each step, and reads the answer once the step is under way.

  The devices find the answer, between two steps: they never wait for a host, and hosts run one step
  ahead of them. A process alone is not asked.
  """

  def __init__(self, interrupts: Interrupts, mesh: Mesh):
    self.exit_code: int | None = None  # What to leave with, once it is time to.
    self._interrupts, self._alone = interrupts, jax.process_count() == 1
    self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    self._codes: dict[int, jax.Array] = {}  # Those that this process has given.
    # On CPU, programs that are not waited for can deadlock where devices are many.
    self._waits = mesh.devices.flat[0].platform == "cpu"
    self._answer: jax.Array | None = None

  def ask(self) -> None:
    """Call it before each step, in every process."""
    if not self._alone:
      self._answer = self._largest(self._code(self._interrupts.exit_code or 0))
      if self._waits:
        jax.block_until_ready(self._answer)

  def is_due(self) -> bool:
    """Whether to stop after the step that is under way."""
    self.exit_code = (
      self._interrupts.exit_code if self._answer is None else int(self._answer) or None
    )
    return self.exit_code is not None

  def _code(self, code: int) -> jax.Array:
    """This process's code on each of its devices."""
    if code not in self._codes:
      count = self._each.mesh.size
      self._codes[code] = jax.make_array_from_callback(
        (count,), self._each, lambda _: np.array([code], np.int32)
      )
    return self._codes[code]
