"""What the optimized HLO text of a TPU program says it does: collectives and cycles.

An instruction in a loop stands once in the text and runs on every trip: each computation is
counted by itself, then added up from the entry, times the trips of the loops that it is in.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
  "collective-broadcast",
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COLLECTIVE = re.compile(rf" ({'|'.join(COLLECTIVES)})(-start)?\(")
_CALLED = re.compile(
  r"\b(calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_BRANCH = re.compile(r"\b(?:true|false)_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\]")
# An integer: its name, operation, operands, and of which member of a tuple it is.
_INTEGER = re.compile(
  r"%([\w.\-]+) = [su](?:32|64)\[\]\S* (add|copy|constant|get-tuple-element)\((.*?)\)"
  r"(?:, index=(\d+))?"
)
_ROOT = re.compile(r"ROOT %[\w.\-]+ = \(.*\) tuple\((.*?)\)")


class Traffic(NamedTuple):
  """Of one kind of collective, on one device."""

  count: int
  bytes: int  # The larger of what goes in and what comes out of each, summed.

  def times(self, trips: int) -> "Traffic":
    return Traffic(self.count * trips, self.bytes * trips)

  def plus(self, other: "Traffic") -> "Traffic":
    return Traffic(self.count + other.count, self.bytes + other.bytes)


class Costs(NamedTuple):
  """Of one run of a computation, on one device."""

  cycles: int = 0  # The compiler's estimate of fusions and copies; kernels are not in it.
  collectives: Mapping[str, Traffic] = {}
  kernels: int = 0  # Pallas calls.
  open_loops: int = 0  # Loops whose trips are not known before they run: counted as one.

  def times(self, trips: int) -> "Costs":
    traffic = {kind: value.times(trips) for kind, value in self.collectives.items()}
    return Costs(self.cycles * trips, traffic, self.kernels * trips, self.open_loops * trips)

  def plus(self, other: "Costs") -> "Costs":
    traffic = dict(self.collectives)
    for kind, value in other.collectives.items():
      traffic[kind] = traffic.get(kind, Traffic(0, 0)).plus(value)
    return Costs(
      self.cycles + other.cycles,
      traffic,
      self.kernels + other.kernels,
      self.open_loops + other.open_loops,
    )


@dataclass
class _Computation:
  own: Costs = field(default_factory=Costs)
  # What it calls: one of the named computations, so many times.
  calls: list[tuple[Sequence[str], int]] = field(default_factory=list)
  loops: list[tuple[str, str, int]] = field(default_factory=list)  # Body, condition, trips or 0.
  limits: list[int] = field(default_factory=list)  # Integer constants.
  members: list[int] = field(default_factory=list)  # Of its argument, integers that it reads.
  # Members of its argument that it gives back larger -> by how much.
  steps: dict[int, int] = field(default_factory=dict)


def costs(text: str) -> Costs:
  """Of one run of a module, on one device, from `compiled.as_text()`."""
  computations, entry = _parse(text)

  @cache
  def total(name: str) -> Costs:
    computation = computations[name]
    result = computation.own
    for names, times in computation.calls:
      branches = [total(each) for each in names if each in computations]
      if branches:
        result = result.plus(max(branches, key=_weight).times(times))
    for body, condition, known in computation.loops:
      trips = known or _trips(computations, body, condition)
      if not trips:
        result = result.plus(Costs(open_loops=1))
      result = result.plus(total(body).plus(total(condition)).times(trips or 1))
    return result

  return total(entry)


def _weight(value: Costs) -> tuple[int, int]:
  return value.cycles, sum(traffic.bytes for traffic in value.collectives.values())


def _trips(computations: Mapping[str, _Computation], body: str, condition: str) -> int:
  """Of a loop that counts from 0, by the step of its body, to the one number that its condition
  compares with; 0 if it is not of this kind."""
  compares = computations[condition]
  limits = list(compares.limits)
  for names, _ in compares.calls:
    limits += [limit for name in names for limit in computations[name].limits]
  if len(limits) != 1 or len(compares.members) != 1:
    return 0
  step = computations[body].steps.get(compares.members[0], 0)
  return math.ceil(limits[0] / step) if step else 0


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  computations: dict[str, _Computation] = {}
  entry, lines = "", []
  for line in _lines(text):
    if not line.startswith(" "):
      if start := _COMPUTATION.match(line):
        name, lines = start[2], []
        entry = name if start[1] else entry
      elif line == "}":
        computations[name] = _read(name, lines)
    else:
      lines.append(line)
  return computations, entry


def _lines(text: str) -> Iterator[str]:
  """As splitlines, but without a copy of tens of megabytes."""
  start = 0
  while (end := text.find("\n", start)) >= 0:
    yield text[start:end]
    start = end + 1
  yield text[start:]


def _read(name: str, lines: Sequence[str]) -> _Computation:
  result = _Computation()
  cycles, kernels = 0, 0
  traffic: dict[str, Traffic] = defaultdict(lambda: Traffic(0, 0))
  scatters = "all-reduce-scatter" in name  # TPUs scatter by a fusion of a reduction and a slice.
  for line in lines:
    if found := _CYCLES.search(line):
      cycles += int(found[1])
    if found := _COLLECTIVE.search(line):
      kind = "reduce-scatter" if scatters and found[1] == "all-reduce" else found[1]
      traffic[kind] = traffic[kind].plus(Traffic(1, _moved(line, found, lines)))
    if 'custom_call_target="tpu_custom_call"' in line:
      kernels += 1
    _read_calls(line, result)
  result.own = Costs(cycles, dict(traffic), kernels)
  _read_integers(lines, result)
  return result


def _read_integers(lines: Sequence[str], result: _Computation) -> None:
  sums: dict[str, tuple[int | None, int]] = {}  # Name -> member of the argument, what is added.
  for line in lines:
    if found := _INTEGER.search(line):
      name, operation, operands, member = found.groups()
      if operation == "constant" and operands.isdecimal():
        sums[name] = None, int(operands)
        result.limits.append(int(operands))
      elif operation == "get-tuple-element":
        sums[name] = int(member), 0
        result.members.append(int(member))
      else:
        parts = [sums.get(part) for part in re.findall(r"%([\w.\-]+)", operands)]
        members = [part[0] for part in parts if part and part[0] is not None]
        if None not in parts and len(members) < 2:
          sums[name] = next(iter(members), None), sum(part[1] for part in parts if part)
    elif found := _ROOT.search(line):
      for member, name in enumerate(re.findall(r"%([\w.\-]+)", found[1])):
        source, added = sums.get(name, (None, 0))
        if source == member and added:
          result.steps[member] = added


def _read_calls(line: str, result: _Computation) -> None:
  head = line.split(", metadata=", 1)[0]
  called = {key: re.findall(r"[\w.\-]+", names) for key, names in _CALLED.findall(head)}
  if "body" in called:
    known = _TRIPS.search(line)
    body, condition = called["body"][0], called["condition"][0]
    result.loops.append((body, condition, int(known[1]) if known else 0))
    return
  if re.search(r" async-(update|done)\(", head):
    return  # Its start has been counted.
  for key in ("calls", "to_apply", "branch_computations"):
    if key in called:
      result.calls.append((called[key], 1))
  if branches := _BRANCH.findall(head):
    result.calls.append((branches, 1))


def _moved(line: str, found: re.Match[str], lines: Sequence[str]) -> int:
  """Bytes of a collective: of its results, or of its operands where those are larger."""
  result = line[line.index("=") + 1 : found.start()]
  if found[2] and result.lstrip().startswith("("):
    # A start gives (operands, results, ...), and but for reductions its result is of both.
    parts = _parts(result.strip())
    result = parts[1] if found[1] != "all-reduce" and len(parts) > 1 else result
  size = _bytes(result)
  if found[1] == "reduce-scatter":
    names = re.findall(r"%([\w.\-]+)", line[found.end() :].split(")", 1)[0])
    size = max(size, sum(_bytes(_defined(name, lines)) for name in names))
  return size


def _defined(name: str, lines: Sequence[str]) -> str:
  """The type of an instruction of the same computation."""
  for line in lines:
    left, _, right = line.partition(" = ")
    if left.strip().removeprefix("ROOT ").removeprefix("%") == name:
      return _parts(right)[0] if right.startswith("(") else right.split(" ", 1)[0]
  return ""


def _parts(text: str) -> list[str]:
  """The members of a tuple's type."""
  parts, depth, start = [], 0, 1
  for place, letter in enumerate(text):
    if letter in "({[":
      depth += 1
    elif letter in ")}]":
      depth -= 1
    if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
      parts.append(text[start:place])
      start = place + 1
    if depth == 0:
      break
  return parts


def _bytes(type_text: str) -> int:
  return sum(
    int(_width(kind) * math.prod(int(size) for size in sizes.split(",") if size))
    for kind, sizes in _ARRAY.findall(type_text)
  )


def _width(kind: str) -> float:
  """Bytes of a number: its kind ends with its bits, but for truth values."""
  bits = re.search(r"\d+", kind)
  return int(bits[0]) / 8 if bits else kind == "pred"
