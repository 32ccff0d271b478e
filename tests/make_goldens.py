"""Makes a folder of reference tensors with diffusers, transformers and peft.

python tests/make_goldens.py --out FOLDER [--seed N] [--heads N] ...

Builds small models with random weights, runs them on one CPU thread in float32, and writes weights,
inputs and outputs as `tests/data/goldens/README.md` says. Without further flags the sizes are those
of `tests/data/goldens`. What the tool wrote into the folder before is replaced; other files stay.
Needs the extra `test`. Weights and inputs are drawn by name, so that another version of a library,
or another processor, changes the outputs by rounding alone.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # Where the package is, under `python -m` too.
from goldens_maker import adapters, networks, pipelines, sat, schedules, tables
from goldens_maker.folder import GoldensFolder
from goldens_maker.models import Sizes

SECTIONS = {
  "tables": tables.make,
  "schedules": schedules.make,
  "networks": networks.make,
  "adapters": adapters.make,
  "sat": sat.make,
  "pipelines": pipelines.make,
}


def main(arguments: list[str]) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=Path, required=True, help="The folder.")
  for field in dataclasses.fields(Sizes):
    flag = f"--{field.name.replace('_', '-')}"
    parser.add_argument(flag, dest=field.name, type=field.type, default=field.default)
  given = vars(parser.parse_args(arguments))
  folder = GoldensFolder(given.pop("out"), Sizes(**given))
  for name, make in SECTIONS.items():
    print(f"{name} ...", flush=True)
    make(folder)
  folder.write_index()
  print(f"Wrote {len(folder.cases)} cases to {folder.path}, {folder.size() / 1e6:.2f} MB.")


if __name__ == "__main__":
  main(sys.argv[1:])
