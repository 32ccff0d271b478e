"""Writes the digests of the packages that CI and images install, in the versions of the lock.

python tests/make_hashes.py python3.11 python3.12

For each interpreter, on Linux with x86_64 processors, pip resolves the package and installs
nothing:

requirements-hashes.txt          with the extras `test` and `dev`: what CI installs
launch/requirements-hashes.txt   with the extras `tpu` and `gcs`: what the image of launch/ has

pip refuses a file with another digest (--require-hashes). PyTorch is not among them, nor what it
brings for GPUs: it comes from another index on each platform.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import make_lock

FILES = {
  make_lock.ROOT / "requirements-hashes.txt": "test,dev",
  make_lock.ROOT / "launch" / "requirements-hashes.txt": "tpu,gcs",
}
HEAD = """\
# Digests of packages: pip install --no-deps --require-hashes -r THIS_FILE. Extras: {extras}.
# Written by: python tests/make_hashes.py python3.11 python3.12
"""
SKIPPED = (*make_lock.SKIPPED, "torch")
Found = dict[str, tuple[str, str]]  # Package -> version, sha256.


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="oldest first")
  pythons = parser.parse_args().pythons
  for file, extras in FILES.items():
    found = {make_lock.minor_version(python): resolve(python, extras) for python in pythons}
    file.write_text(HEAD.format(extras=extras) + "".join(f"{line}\n" for line in lines(found)))


def resolve(python: str, extras: str) -> Found:
  """Returns what pip would install for an interpreter, within the versions of the lock."""
  with tempfile.TemporaryDirectory() as folder:
    report, limits = Path(folder) / "report.json", Path(folder) / "limits.txt"
    # The tests compile with a libtpu of their own; the image has the one that jax asks for.
    limits.write_text("".join(f"{line}\n" for line in locked() if "tpu" not in line))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    options = ["--dry-run", "--ignore-installed", f"--report={report}", f"--constraint={limits}"]
    options += [] if "tpu" in extras else [f"--constraint={make_lock.LOCK}"]
    # setuptools builds the package itself, in the image without another index.
    subprocess.run([*pip, *options, f"{make_lock.ROOT}[{extras}]", "setuptools"], check=True)
    return packages(json.loads(report.read_text())["install"])


def locked() -> list[str]:
  return make_lock.LOCK.read_text().splitlines()


def packages(installs: list[dict[str, Any]]) -> Found:
  """Returns the packages of pip's report, without those that are skipped."""
  found = {}
  for item in installs:
    name = item["metadata"]["name"].lower().replace("_", "-").replace(".", "-")
    if not name.startswith(SKIPPED):
      digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
      found[name] = (item["metadata"]["version"], digest)
  return found


def lines(found: dict[str, Found]) -> list[str]:
  """The requirements, by name. found: interpreter's version -> package -> version and digest."""
  result = []
  for name in sorted({name for packages in found.values() for name in packages}):
    versions: dict[str, dict[str, str]] = {}
    for python, packages in found.items():
      if name in packages:
        version, digest = packages[name]
        versions.setdefault(version, {})[python] = digest
    for version, digests in versions.items():
      everywhere = len(digests) == len(found)
      marker = "" if everywhere else f' ; python_version == "{next(iter(digests))}"'
      hashes = " ".join(f"--hash=sha256:{digest}" for digest in dict.fromkeys(digests.values()))
      result.append(f"{name}=={version}{marker} {hashes}")
  return result


if __name__ == "__main__":
  main()
