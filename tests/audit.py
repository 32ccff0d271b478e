"""Looks the packages of requirements files up among known vulnerabilities, by pip-audit.

python tests/audit.py requirements-hashes.txt launch/requirements-hashes.txt

Exit code 0: none is known, or the index gave no answer, which is said. 1: one is known, or the
audit itself failed.
"""

import json
import re
import subprocess
import sys
from typing import Any

LINE = "{name} {version}: {id}, mended in {mended}"


# What pip-audit prints if it does not reach the index.
OUT_OF_REACH = re.compile(
  r"connect|timed? ?out|resolv|reach|route|HTTPError|\b50\d\b", re.IGNORECASE
)


def main(files: list[str]) -> int:
  command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--format=json"]
  worst = 0
  for file in files:  # One by one, because a package may have another version in each.
    done = subprocess.run(
      [*command, f"--requirement={file}"], capture_output=True, text=True, check=False
    )
    code, text = judged(done.stdout, done.stderr)
    print(f"{file}: {text}")
    worst = max(worst, code)
  return worst


def judged(output: str, errors: str) -> tuple[int, str]:
  """Returns the exit code and what to print, from what pip-audit printed."""
  try:
    packages = json.loads(output)["dependencies"]
  except ValueError:
    words = next(iter(errors.strip().splitlines()[-1:]), "it printed nothing")
    if OUT_OF_REACH.search(words):
      return 0, f"the index gave no answer ({words[:200]}): vulnerabilities are not known."
    return 1, f"pip-audit failed: {words[:200]}"
  if found := [line for package in packages for line in _vulnerabilities(package)]:
    return 1, "\n".join(["known vulnerabilities:", *found])
  unknown = [package["name"] for package in packages if "skip_reason" in package]
  if len(unknown) == len(packages):
    return 0, "the index gave no answer for any package: vulnerabilities are not known."
  others = f"; no answer for {', '.join(unknown)}" if unknown else ""
  return 0, f"none known of {len(packages) - len(unknown)} packages{others}"


def _vulnerabilities(package: dict[str, Any]) -> list[str]:
  return [
    LINE.format(
      name=package["name"],
      version=package["version"],
      id=one["id"],
      mended=", ".join(one["fix_versions"]) or "no version yet",
    )
    for one in package.get("vulns", ())
  ]


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
