"""Suggests what would make a program fit, in three sentences with the numbers of its config."""

import math
from typing import NamedTuple

from cogvideox_jax.aot import vae_fixes
from cogvideox_jax.aot.topology import CHIPS, GIB, Topology
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.inference.size import Size
from cogvideox_jax.training import components

# Pods in rising size, by how many axes their shapes have: two on v5e and v6e, else three.
_SHAPES = {
  2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
  3: ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)),
}


class Demand(NamedTuple):
  """What a program needs."""

  program: str  # One of programs.PROGRAMS.
  stage: str
  size: Size  # The largest clip.
  rows: int  # Packed rows, or clips, on all devices.
  state: int  # Bytes on a device that stay there from step to step.
  total: int  # Bytes on a device.


def suggest(config: TrainConfig | VAETrainConfig, topology: Topology, demand: Demand) -> list[str]:
  """Three suggestions; those that change least come first."""
  if demand.program != "train":
    found = _take_tiles(config, demand)
  elif isinstance(config, VAETrainConfig):
    beside = demand.total - demand.state
    found = vae_fixes.suggest(config, topology, demand.stage, demand.size, demand.rows, beside)
  else:
    found = _change_training(config, topology, demand)
  found += _take_chips(topology, demand.total)
  if demand.program != "train":
    found.append(
      "Take a smaller clip: half of --height and half of --width leave a quarter of what a step "
      f"holds beside its parameters, which is {(demand.total - demand.state) / GIB:.1f} GiB now."
    )
  return found[:3]


def _take_tiles(config: TrainConfig | VAETrainConfig, demand: Demand) -> list[str]:
  size = demand.size
  height, width = (side.pixels for side in components.vae_config(config).tiling)
  if demand.program != "decode" or (size.height <= height and size.width <= width):
    return []
  advice = (
    f"Sample with --tiling: then {height}x{width} of the {size.height}x{size.width} pixels are "
    f"decoded at a time, which compiles with --height={height} --width={width}."
  )
  return [advice]


def _change_training(config: TrainConfig, topology: Topology, demand: Demand) -> list[str]:
  stage, state = demand.stage, demand.state
  chip, sizes, devices = topology.chip, config.stages[stage], len(topology.devices)
  tokens = sizes.row_tokens // sizes.context
  # Bytes of one array for each layer, in bfloat16.
  kept = 2 * config.model.depth * tokens * config.model.width
  found = []
  if config.remat == "branches" and demand.total - kept < chip.hbm_bytes:
    found.append(
      f"Set config.remat=attention: what the MLPs of the {config.model.depth} layers add, "
      f"{kept / GIB:.1f} GiB for each row that a device computes with, is computed again."
    )
  if state > chip.hbm_bytes / 2:
    everywhere = state * devices
    for shape in _SHAPES[len(topology.shape)]:
      many = math.prod(shape) * chip.devices
      if many > devices and everywhere / many < chip.hbm_bytes / 2:
        name = f"{topology.kind}:{'x'.join(map(str, shape))}"
        found.append(
          f"Use {name} or larger: split over its {many} devices, parameters, optimizer and average "
          f"take {everywhere / many / GIB:.1f} GiB of the {chip.hbm_bytes / GIB:.1f} of each, "
          f"instead of {state / GIB:.1f}."
        )
        break
  if devices >= 2 * sizes.context:
    more = 2 * sizes.context
    found.append(
      f"Set config.stages.{stage}.context={more}: a device then holds "
      f"{sizes.row_tokens // more:,} of a row's {sizes.row_tokens:,} tokens, not "
      f"{sizes.row_tokens // sizes.context:,}."
    )
  if config.remat != "offload":
    found.append(
      f"Set config.remat=offload: the inputs of the {config.model.depth} layers, {kept / GIB:.1f} "
      "GiB for each row that a device computes with, wait in the host's memory."
    )
  if sizes.rows_at_once != 1:
    found.append(f"Set config.stages.{stage}.rows_at_once=1: a device computes with one row only.")
  return found


def _take_chips(topology: Topology, total: int) -> list[str]:
  larger = {
    kind: chip
    for kind, chip in CHIPS.items()
    if chip.hbm_bytes > max(total, topology.chip.hbm_bytes)
  }
  found = [
    f"Use {kind}: a device of it has {chip.hbm_bytes / GIB:.1f} GiB, and this program wants "
    f"{total / GIB:.1f}."
    for kind, chip in larger.items()
  ]
  found.append(
    f"Use more chips than the {len(topology.devices) // topology.chip.devices} of {topology.name}: "
    f"each of its devices would need {total / GIB:.1f} GiB and has "
    f"{topology.chip.hbm_bytes / GIB:.1f}."
  )
  return found
