"""Compares every case of a folder of reference tensors with this package.

python -m tests.goldens FOLDER

Prints a table of tensors and last how many cases passed; the exit code is 1 unless all did.
"""

import sys
from pathlib import Path

from .folder import Folder
from .runner import run


def main(path: str) -> int:
  folder = Folder(Path(path))
  passed = failed = 0
  print(f"{'case':44} {'tensor':44} {'error':>9} {'floor':>9} {'tolerance':>9}")
  for name in folder.names:
    results = run(folder, name)
    for result in results:
      floor = "–" if result.floor is None else f"{result.floor:.1e}"
      verdict = "pass" if result.passed else "FAIL"
      numbers = f"{result.error:9.1e} {floor:>9} {result.tolerance:9.1e}"
      print(f"{result.case:44} {result.tensor:44} {numbers} {verdict}", flush=True)
    good = bool(results) and all(result.passed for result in results)
    passed, failed = passed + good, failed + (not good)
  print(f"{passed} passed, {failed} failed")
  return 1 if failed else 0


if __name__ == "__main__":
  if len(sys.argv) != 2:
    sys.exit("usage: python -m tests.goldens FOLDER")
  sys.exit(main(sys.argv[1]))
