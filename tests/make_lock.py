"""Writes requirements-lock.txt: the versions that tests and CI install.

python tests/make_lock.py python3.11 python3.12

For each interpreter, pip resolves the package with the extras `test` and `dev` and installs
nothing. A package with one version for all interpreters gets one line. Otherwise each interpreter
gets a line with a marker, because some releases need Python 3.12. Takes minutes: pip downloads
most packages to read what they need.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements-lock.txt"
HEAD = """\
# Versions that the tests and CI install. `make install`, `make test` and `make lint` read this file
# as constraints. requirements.txt and setup.py hold the bounds, which users install by.
# Written by: python tests/make_lock.py python3.11 python3.12
"""
# PyTorch brings these for GPUs on some platforms only, and bounds their versions itself.
SKIPPED = ("cogvideox-jax", "cuda-", "nvidia-", "triton")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="oldest first")
  pythons = parser.parse_args().pythons
  found = {minor_version(python): resolve(python) for python in pythons}
  LOCK.write_text(HEAD + "".join(f"{line}\n" for line in lines(found)))


def minor_version(python: str) -> str:
  """`3.11` of an interpreter."""
  program = "import sys; print(*sys.version_info[:2], sep='.')"
  return subprocess.run(
    [python, "-c", program], check=True, capture_output=True, text=True
  ).stdout.strip()


def resolve(python: str) -> dict[str, str]:
  """Package name -> version of everything that pip would install for an interpreter."""
  with tempfile.TemporaryDirectory() as folder:
    report = Path(folder) / "report.json"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    options = ["--dry-run", "--ignore-installed", f"--report={report}"]
    subprocess.run([*pip, *options, f"{ROOT}[test,dev]"], check=True)
    packages = [item["metadata"] for item in json.loads(report.read_text())["install"]]
  return {
    package["name"].lower().replace("_", "-"): package["version"].partition("+")[0]
    for package in packages
    if not package["name"].startswith(SKIPPED)
  }


def lines(found: dict[str, dict[str, str]]) -> list[str]:
  """The constraints, by name. found: interpreter's version -> package -> version."""
  names = sorted({name for versions in found.values() for name in versions})
  result = []
  for name in names:
    versions = {python: packages.get(name) for python, packages in found.items()}
    if len(set(versions.values())) == 1:
      result.append(f"{name}=={next(iter(versions.values()))}")
    else:
      result += [
        f'{name}=={version} ; python_version == "{python}"'
        for python, version in versions.items()
        if version
      ]
  return result


if __name__ == "__main__":
  main()
