"""Reads collectives and cycles from the optimized HLO text of a TPU program.

An instruction in a loop is in the text once, but runs on every trip. So each computation is counted
by itself; then computations are added up from the entry on, times the trips of their loops.
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
# An integer: its name, operation, operands, and which member of a tuple it is.
_INTEGER = re.compile(
  r"%([\w.\-]+) = [su](?:32|64)\[\]\S* (add|copy|constant|get-tuple-element)\((.*?)\)"
  r"(?:, index=(\d+))?"
)
_ROOT = re.compile(r"ROOT %[\w.\-]+ = \(.*\) tuple\((.*?)\)")


@dataclass(frozen=True)
class Traffic:
  """All collectives of one kind on one device."""

  count: int
  bytes: int  # A sum, in which each counts with its inputs or its outputs, whichever is larger.

  def times(self, trips: int) -> "Traffic":
    return Traffic(self.count * trips, self.bytes * trips)

  def plus(self, other: "Traffic") -> "Traffic":
    return Traffic(self.count + other.count, self.bytes + other.bytes)


class Costs(NamedTuple):
  """What one run of a computation costs on one device."""

  cycles: int = 0  # The compiler's estimate for fusions and copies, without kernels.
  collectives: Mapping[str, Traffic] = {}
  kernels: int = 0  # Calls of Pallas kernels.
  open_loops: int = 0  # Loops of unknown trip counts, counted as one trip.

  def times(self, trips: int) -> "Costs":
    traffic = {kind: each.times(trips) for kind, each in self.collectives.items()}
    return Costs(self.cycles * trips, traffic, self.kernels * trips, self.open_loops * trips)

  def plus(self, other: "Costs") -> "Costs":
    traffic = dict(self.collectives)
    for kind, added in other.collectives.items():
      traffic[kind] = traffic.get(kind, Traffic(0, 0)).plus(added)
    return Costs(
      self.cycles + other.cycles,
      traffic,
      self.kernels + other.kernels,
      self.open_loops + other.open_loops,
    )


@dataclass
class _Computation:
  """What the text says of one computation."""

  own: Costs = field(default_factory=Costs)  # Without what it calls.
  # Its calls: each calls one of the named computations, so many times.
  calls: list[tuple[Sequence[str], int]] = field(default_factory=list)
  # Its loops: body, condition, and trips, which are 0 if the text does not state them.
  loops: list[tuple[str, str, int]] = field(default_factory=list)
  limits: list[int] = field(default_factory=list)  # Integer constants.
  members: list[int] = field(default_factory=list)  # Integers that it reads of its tuple argument.
  # Members of its argument that it returns larger -> by how much.
  steps: dict[int, int] = field(default_factory=dict)


def costs(text: str) -> Costs:
  """What one run of a module costs on one device; text: as from `compiled.as_text()`."""
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


def _weight(branch: Costs) -> tuple[int, int]:
  """What the dearest of some branches is chosen by."""
  return branch.cycles, sum(traffic.bytes for traffic in branch.collectives.values())


def _trips(computations: Mapping[str, _Computation], body: str, condition: str) -> int:
  """The trips of a loop that counts from 0 to the one number that its condition compares with.

  Returns 0 if the loop is of another kind.
  """
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
  entry, name, lines = "", "", []
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
  """`text.splitlines()` without a copy of tens of megabytes."""
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
  """Reads limits, members and steps, from which `_trips` finds the trips of loops."""
  sums: dict[str, tuple[int | None, int]] = {}  # Name -> member of the argument, number added.
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
        terms = [sums.get(term) for term in re.findall(r"%([\w.\-]+)", operands)]
        members = [term[0] for term in terms if term and term[0] is not None]
        if None not in terms and len(members) < 2:
          sums[name] = next(iter(members), None), sum(term[1] for term in terms if term)
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
    return  # The async-start has been counted.
  for key in ("calls", "to_apply", "branch_computations"):
    if key in called:
      result.calls.append((called[key], 1))
  if branches := _BRANCH.findall(head):
    result.calls.append((branches, 1))


def _moved(line: str, found: re.Match[str], lines: Sequence[str]) -> int:
  """Bytes of a collective's results, or of its operands where those are larger."""
  result = line[line.index("=") + 1 : found.start()]
  if found[2] and result.lstrip().startswith("("):
    # The type of a start is (operands, results, ...), but that of a reduction's is the results.
    members = _tuple_members(result.strip())
    result = members[1] if found[1] != "all-reduce" and len(members) > 1 else result
  size = _bytes(result)
  if found[1] == "reduce-scatter":
    names = re.findall(r"%([\w.\-]+)", line[found.end() :].split(")", 1)[0])
    size = max(size, sum(_bytes(_defined(name, lines)) for name in names))
  return size


def _defined(name: str, lines: Sequence[str]) -> str:
  """The type of the instruction that the lines define by this name."""
  for line in lines:
    left, _, right = line.partition(" = ")
    if left.strip().removeprefix("ROOT ").removeprefix("%") == name:
      return _tuple_members(right)[0] if right.startswith("(") else right.split(" ", 1)[0]
  return ""


def _tuple_members(text: str) -> list[str]:
  """The types of the members in a tuple's type."""
  members, depth, start = [], 0, 1
  for index, letter in enumerate(text):
    if letter in "({[":
      depth += 1
    elif letter in ")}]":
      depth -= 1
    if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
      members.append(text[start:index])
      start = index + 1
    if depth == 0:
      break
  return members


def _bytes(type_text: str) -> int:
  """Bytes of all arrays in a type."""
  return sum(
    int(_width(kind) * math.prod(int(size) for size in sizes.split(",") if size))
    for kind, sizes in _ARRAY.findall(type_text)
  )


def _width(kind: str) -> float:
  """Bytes of a number, from the bits that its kind ends with; truth values have none there."""
  bits = re.search(r"\d+", kind)
  return int(bits[0]) / 8 if bits else kind == "pred"
