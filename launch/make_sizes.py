"""Compiles the shipped configs for pods that are not attached, and writes the table of what fits.

python launch/make_sizes.py               compiles what has no log yet, then writes launch/sizes.md
python launch/make_sizes.py --again       compiles everything
python launch/make_sizes.py --only=v5e    compiles the programs whose log's name contains this

`python -m cogvideox_jax.compile` compiles each program. Its JSON object is kept in
benchmarks/compile/NAME.json, with the command. A program takes minutes of a core and some GB of
memory, but no TPU.
"""

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "benchmarks" / "compile"
TABLE = ROOT / "launch" / "sizes.md"
GIB = 2**30


class Case(NamedTuple):
  """A program to compile."""

  config: str
  topology: str
  stage: int = 1
  program: str = "train"
  flags: tuple[str, ...] = ()  # Further flags, which the pod needs or is tried with.
  tag: str = ""  # Ends the log's name, where cases differ only in their flags.

  @property
  def name(self) -> str:
    what = f"stage{self.stage}" if self.program == "train" else self.program
    words = (self.config, what, self.topology.replace(":", "-"), self.tag)
    return "-".join(word for word in words if word)

  @property
  def command(self) -> list[str]:
    return [
      *("python", "-m", "cogvideox_jax.compile", f"--config=configs/{self.config}.py"),
      *(f"--topology={self.topology}", f"--program={self.program}", f"--stage={self.stage}"),
      *self.flags,
      "--json",
    ]


def context(devices: int) -> tuple[str, ...]:
  return (f"--config.mesh.context={devices}",)


# Makes each row hold one clip of 49x480x720, the published model's size.
ONE_CLIP = (
  "--config.stages.stage2.sizes=((480, 720),)",
  "--config.stages.stage2.row_tokens=17776",
  "--config.stages.stage2.max_clips=1",
)
CASES = (
  Case("2b", "v6e:4x4", 1),
  Case("5b", "v5p:2x2x4", 1),
  Case("1_5_5b", "v5p:2x2x4", 1),
  Case("2b", "v5e:1x1", program="sample"),
  Case("5b", "v5e:1x1", program="sample"),
  Case("5b", "v6e:1x1", program="sample"),
  Case(
    "1_5_5b",
    "v6e:2x4",
    program="sample",
    flags=("--num_frames=81", "--height=768", "--width=1360"),
  ),
  *(Case("2b", "v6e:1x1", program=program) for program in ("decode", "encode")),
  Case("2b", "v5e:1x1", program="decode"),
  Case("2b", "v5e:1x1", program="decode", flags=("--height=240", "--width=360"), tag="tile"),
  *(Case(config, "v5p:4x4x8", 3) for config in ("2b", "5b", "1_5_5b")),
  *(
    Case(config, topology, 2, flags=flags)
    for config in ("2b", "5b", "1_5_5b")
    for topology, flags in (
      ("v5e:8x8", context(8)),
      ("v5p:4x4x4", ()),
      ("v6e:8x8", context(4)),
      ("tpu7x:4x4x4", ()),
    )
  ),
  Case("5b", "v5e:4x4", 2),
  *(
    Case("5b", topology, 1, flags=("--config.remat=linear",), tag="linear")
    for topology in ("v5p:2x2x4", "tpu7x:2x2x4")
  ),
  Case("5b", "v6e:8x8", 1),
  Case("5b", "v5p:4x4x4", 2, flags=("--config.remat=linear", *context(4)), tag="linear"),
  Case("5b", "v5e:8x8", 2, flags=("--config.remat=offload", *context(8)), tag="offload"),
  *(
    Case("5b", topology, 2, flags=ONE_CLIP, tag="one-clip")
    for topology in ("v5p:2x2x4", "v6e:4x4", "tpu7x:2x2x4")
  ),
  Case("5b", "v5p:2x2x4:2", 1, tag="slices"),
)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--again", action="store_true", help="compile also what has a log")
  parser.add_argument("--only", default="", help="text that the names of the logs to make contain")
  options = parser.parse_args()
  LOGS.mkdir(exist_ok=True)
  for case in CASES:
    log = LOGS / f"{case.name}.json"
    if options.only in case.name and (options.again or not log.exists()):
      log.write_text(json.dumps(run(case), indent=1) + "\n")
  TABLE.write_text(table())
  return 0


def run(case: Case) -> dict[str, Any]:
  """The JSON object that `compile` prints for a case, with its command and versions."""
  print(" ".join(case.command), flush=True)
  done = subprocess.run(
    [sys.executable, *case.command[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
  )
  if done.returncode not in (0, 1) or not done.stdout:  # Python exits with 1, too, if it fails.
    raise SystemExit(f"{case.name}: exit code {done.returncode}")
  versions = {name: version(name) for name in ("jax", "libtpu")}
  return {
    "command": " ".join(case.command),
    **versions,
    **json.loads(done.stdout.splitlines()[-1]),
  }


def table() -> str:
  """The text of launch/sizes.md, with a line for each case that has a log."""
  rows = [
    row(case, json.loads(log.read_text()))
    for case in CASES
    if (log := LOGS / f"{case.name}.json").exists()
  ]
  return "\n".join([HEAD, *rows, ""])


def row(case: Case, log: dict[str, Any]) -> str:
  memory = log["bytes_per_chip"]
  mesh = " ".join(f"{axis} {size}" for axis, size in log["mesh"].items() if size > 1) or "one"
  clip = "x".join(str(log[side]) for side in ("num_frames", "height", "width"))
  what = f"stage {case.stage}" if case.program == "train" else f"{case.program} {clip}"
  cells = (
    case.config,
    what + " ".join(f" `{flag.removeprefix('--config.')}`" for flag in case.flags),
    case.topology,
    mesh,
    log["rows"],
    f"{memory['state'] / GIB:.2f}",
    f"{memory['total'] / GIB:.2f} of {log['hbm_bytes'] / GIB:.2f}",
    "yes" if log["fits"] else f"**no**: {' '.join(log['fixes'])}",
    f"{log['estimated_seconds']:.3g}" if log["estimated_from"] == "cycles" else "",
    f"{log['mfu_ceiling']:.1%}" if log["estimated_from"] == "cycles" else "",
  )
  return f"| {' | '.join(map(str, cells))} |"


HEAD = """\
# What fits where

`python launch/make_sizes.py` made this table from the TPU compiler's estimates. Nothing ran on a
TPU. `benchmarks/compile/` holds a log for each line: its command, its collectives and all other
numbers.

- Rows: rows of the global batch in training; the two halves of guidance in sampling; clips in
  encoding and decoding.
- State and total: GiB on each device, out of the GiB that the compiler lets a program use. In
  training, state is fp32 parameters, average and moments; in sampling, the parameters in bfloat16;
  in encoding and decoding, the VAE's parameters in fp32. A tpu7x chip has two devices.
- Seconds: the time of one step, or of encoding or decoding a whole clip. It adds the cycles that
  the compiler estimates, and attention's FLOPs at .40 of the peak on v5e and v5p, .30 on v6e and
  .25 on tpu7x. It does not include waiting for other devices. The cell is empty if the program has
  a loop whose trip count the compiler's text does not state.
- MFU: the model's FLOPs divided by that time, as a fraction of the peak. It is an upper bound.

| config | program | pod | mesh | rows | state | total | fits | seconds | MFU |
|---|---|---|---|---|---|---|---|---|---|"""


if __name__ == "__main__":
  sys.exit(main())
