"""What would make a program fit, in sentences with the numbers of this config."""

from typing import Any

from cogvideox_jax.aot.programs import Program
from cogvideox_jax.aot.topology import GIB, Topology


def suggest(config: Any, topology: Topology, program: Program, memory: Any) -> list[str]:
  return [f"Use more chips: the program takes {memory.total / GIB:.1f} GiB a device."]
