"""The TPUs that a program is compiled for, by name: v5p:4x4x4, or v5p:2x2x4:2 for two slices."""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from cogvideox_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
  """What one device can do; JAX counts a chip of v4 or tpu7x as two devices.

  Peaks and bandwidths are the published ones of a chip, divided by its devices.
  """

  devices: int  # Devices a chip.
  peak: float  # bf16 FLOP/s.
  bandwidth: float  # Bytes/s of HBM.
  hbm_bytes: int  # Bytes that the compiler says a program may use.
  products: int  # Multiply-adds of the matrix units in a cycle.
  attention_rate: float  # Share of the peak that attention reaches, counting products that run.
  example: str  # A shape that exists.

  @property
  def clock(self) -> float:
    """Cycles a second, at which the matrix units reach the published peak."""
    return self.peak / (2 * self.products)


# The clocks that follow are the published ones for v4 (1.05 GHz), v5e (1.5), v5p and v6e (1.75). No
# clock is published for tpu7x: 2.2 GHz follows from its peak and four matrix units of 256x256 a
# device (by the compiler's estimate a large product runs at 87% of that).
CHIPS = {
  "v4": Chip(2, 137.5e12, 614e9, int(15.25 * GIB), 4 * 128**2, 0.40, "2x2x1"),
  "v5e": Chip(1, 197e12, 819e9, int(15.75 * GIB), 4 * 128**2, 0.40, "2x4"),
  "v5p": Chip(1, 459e12, 2765e9, int(95.73 * GIB), 8 * 128**2, 0.40, "2x2x4"),
  "v6e": Chip(1, 918e12, 1640e9, int(31.24 * GIB), 4 * 256**2, 0.30, "2x4"),
  "tpu7x": Chip(2, 1153.5e12, 3690e9, int(94.74 * GIB), 4 * 256**2, 0.25, "2x2x4"),
}
# Answers to what libtpu would ask the machine about its TPUs.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5p-8",  # Any kind will do: the topology's name decides.
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Topology:
  """The devices of a pod, or of several slices, that programs are compiled for."""

  name: str
  kind: str  # A key of CHIPS.
  shape: tuple[int, ...]
  slices: int
  devices: Sequence[Any]  # As `jax.Device`s, on which nothing can run.

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]


def open_topology(name: str) -> Topology:
  """The topology of a name, KIND:SHAPE or KIND:SHAPE:SLICES.

  Call this before JAX looks at its devices.

  Raises:
    UserError: there is no such kind or shape, or libtpu is not installed.
  """
  found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})(?::([1-9]\d*))?", name)
  if not found or found[1] not in CHIPS:
    raise UserError(
      f"Not a TPU topology: {name!r}\n"
      f"Wanted: KIND:SHAPE[:SLICES], such as v5p:4x4x4 or v5p:2x2x4:2; "
      f"kinds are {', '.join(CHIPS)}."
    )
  kind, shape, slices = found[1], found[2], int(found[3] or 1)
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      "The TPU compiler is not installed: there is no libtpu.\n"
      "Install it with pip install -e '.[tpu]'; it needs no TPU."
    )
  _keep_off_accelerators()
  options = {"num_slices": slices} if slices > 1 else {}
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options)
  except jax.errors.JaxRuntimeError as error:
    raise UserError(
      f"There is no TPU topology {name}: {str(error).splitlines()[0]}\n"
      f"A shape of {kind} that exists is {kind}:{CHIPS[kind].example}."
    ) from error
  return Topology(name, kind, tuple(map(int, shape.split("x"))), slices, found.devices)


def _keep_off_accelerators() -> None:
  """Keeps JAX off this machine's accelerators, which compiling does not need."""
  for key, value in _ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  jax.config.update("jax_platforms", "cpu")
  # Nothing that is compiled can run here, so a cache would be of no use.
  jax.config.update("jax_enable_compilation_cache", False)
