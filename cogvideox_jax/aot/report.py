"""Compiles a program for a topology; reports its costs as one object, even if it does not fit."""

import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax

from cogvideox_jax.aot import fixes, hlo, programs
from cogvideox_jax.aot.fixes import Demand
from cogvideox_jax.aot.hlo import Costs
from cogvideox_jax.aot.program import Program, bytes_per_device
from cogvideox_jax.aot.topology import GIB, Topology, open_topology
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.config.vae_schema import VAETrainConfig

_SIZES = re.compile(r"\(?(\d+(?:\.\d+)?)([KMG])\)?")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


class Memory(NamedTuple):
  """Bytes on one device."""

  arguments: int
  temporaries: int
  total: int


class Compiled(NamedTuple):
  """What the compiler says of a program."""

  memory: Memory
  costs: Costs | None  # The costs of one step; None if the compiler gave no text.
  refusal: str  # Why the compiler refused the program; empty if it did not.
  seconds: float  # How long it compiled.


def report(
  config: TrainConfig | VAETrainConfig,
  topology_name: str,
  program: str = "train",
  stage: str = "1",
  **size: int,
) -> dict[str, Any]:
  """The object that `compile --json` prints.

  Args:
    topology_name: see `open_topology`.
    program: one of programs.PROGRAMS.
    stage: number from 1, or name.
    size: num_frames, height and width, for programs that take clips of one size.

  Raises:
    UserError: there is no such topology or stage, or the config does not fit its mesh.
  """
  topology = open_topology(topology_name)
  made = programs.make(config, topology, program, stage, size)
  state = bytes_per_device(made.state)
  if state > topology.chip.hbm_bytes:
    arguments = state + bytes_per_device(made.arguments)
    compiled = Compiled(Memory(arguments, 0, arguments), None, "the state alone is too large", 0.0)
  else:
    compiled = compile_program(made)
  return as_object(config, topology, made, compiled)


def compile_program(program: Program) -> Compiled:
  """Compiles every executable. Running out of memory is an answer here, not an error."""
  start = time.perf_counter()
  memories, total = [], Costs()
  refusal = ""
  for executable in program.executables:
    try:
      memory, costs = compile_lowered(executable.lower())
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      refusal = str(error)
      memories.append(_refused(program, refusal))
      continue
    memories.append(memory)
    total = total.plus(costs.times(executable.times))
  seconds = time.perf_counter() - start
  largest = max(memories, key=lambda memory: memory.total)
  return Compiled(largest, None if refusal else total, refusal, seconds)


def compile_lowered(lowered: Any) -> tuple[Memory, Costs]:
  """Compiles what `jax.jit(...).lower` returns for TPUs; the costs are those of one run."""
  with tempfile.TemporaryDirectory(prefix="hlo_") as folder:
    # The compiler writes its text to a folder, because `as_text()` of what it returns fails for
    # some asynchronous operations, which most programs of several devices have.
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    compiled = lowered.compile(compiler_options=options)
    return _memory(compiled.memory_analysis()), hlo.costs(_text(Path(folder)))


def _text(folder: Path) -> str:
  """Reads the optimized program that the compiler left in a folder."""
  (file,) = folder.glob("*.after_codegen.txt")
  return file.read_text()


def _memory(analysis: Any) -> Memory:
  arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
  added = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  return Memory(arguments, temporaries, arguments + temporaries + added)


def _refused(program: Program, message: str) -> Memory:
  """Estimates the memory of a refused program from the largest size in the compiler's message."""
  arguments = bytes_per_device((program.state, program.arguments))
  sizes = [float(number) * _UNITS[unit] for number, unit in _SIZES.findall(message)]
  wanted = int(max(sizes, default=0))
  if "temporaries" in message:
    return Memory(arguments, wanted, arguments + wanted)
  return Memory(arguments, max(wanted - arguments, 0), max(wanted, arguments))


def as_object(
  config: Any, topology: Topology, program: Program, compiled: Compiled
) -> dict[str, Any]:
  """The object that `report` returns."""
  chip, devices = topology.chip, len(topology.devices)
  memory, costs = compiled.memory, compiled.costs
  fits = not compiled.refusal and memory.total <= chip.hbm_bytes
  attention = program.attention_flops / (devices * chip.peak * chip.attention_rate)
  rest = costs.cycles / chip.clock if costs else program.linear_flops / (devices * chip.peak)
  compute = program.model_flops / (devices * chip.peak)
  state = bytes_per_device(program.state)
  demand = Demand(program.name, program.stage, program.size, program.rows, state, memory.total)
  num_frames, height, width = program.size
  return {
    "program": program.name,
    "stage": program.stage,
    "topology": topology.name,
    "devices": devices,
    "devices_per_chip": chip.devices,
    "mesh": dict(program.mesh),
    "rows": program.rows,
    "num_frames": num_frames,
    "height": height,
    "width": width,
    "fits": fits,
    "refusal": compiled.refusal.splitlines()[0] if compiled.refusal else "",
    "hbm_bytes": chip.hbm_bytes,
    "bytes_per_chip": {
      "state": state,
      "arguments": memory.arguments,
      "temporaries": memory.temporaries,
      "total": memory.total,
    },
    "parameters": program.parameters,
    "model_flops": program.model_flops,
    "roofline_seconds": max(compute, memory.arguments / chip.bandwidth),
    "estimated_seconds": attention + rest,
    "attention_seconds": attention,
    "estimated_from": _source(costs),
    "mfu_ceiling": compute / (attention + rest),
    "collectives": _collectives(costs),
    "compile_seconds": compiled.seconds,
    "fixes": [] if fits else fixes.suggest(config, topology, demand),
  }


def _source(costs: Costs | None) -> str:
  if costs is None:
    return "arithmetic"
  unknown = f", {costs.open_loops} loops of unknown length counted once"
  return "cycles" + unknown * (costs.open_loops > 0)


def _collectives(costs: Costs | None) -> dict[str, dict[str, int]]:
  found: Mapping[str, Any] = costs.collectives if costs else {}
  return {kind: asdict(traffic) for kind, traffic in sorted(found.items())}


def as_table(result: Mapping[str, Any]) -> str:
  """The object as lines for people to read."""
  memory, hbm = result["bytes_per_chip"], result["hbm_bytes"]
  answer = "fits" if result["fits"] else "does not fit"
  device = "device" if result["devices_per_chip"] == 1 else "device (half a chip)"
  where = f"{result['topology']}, {result['devices']} devices"
  lines = [
    f"{result['program']} of {result['stage']} on {where}: {answer}",
    _line("mesh", " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())),
    _line("rows", str(result["rows"])),
    _line("largest clip", f"{result['num_frames']} x {result['height']} x {result['width']}"),
    _line("parameters", f"{result['parameters']:,}"),
    *(_line(f"{kind}, GiB a {device}", f"{memory[kind] / GIB:.2f}") for kind in memory),
    _line(f"of usable GiB a {device}", f"{hbm / GIB:.2f}"),
    _line("model FLOPs of a step", f"{result['model_flops'] / 1e12:,.1f} T"),
    _line("roofline seconds", f"{result['roofline_seconds']:.4g}"),
    _line(
      "estimated seconds",
      f"{result['estimated_seconds']:.4g}, of which attention {result['attention_seconds']:.4g}"
      f" (from {result['estimated_from']})",
    ),
    _line("MFU at most", f"{result['mfu_ceiling']:.1%}"),
    *(
      _line(kind, f"{traffic['count']:,} times, {traffic['bytes'] / GIB:,.2f} GiB a device")
      for kind, traffic in result["collectives"].items()
    ),
    _line("compile seconds", f"{result['compile_seconds']:.0f}"),
  ]
  if result["refusal"]:
    lines.append(f"Why: {result['refusal']}")
  return "\n".join([*lines, *(f"- {fix}" for fix in result["fixes"])])


def _line(name: str, value: str) -> str:
  return f"  {name:28} {value}"
