"""What all benchmarks share: the device, versions and memory that they report, and how."""

import argparse
import json
import os
import platform
import resource
from importlib.metadata import version
from pathlib import Path
from typing import Any


def arguments(doc: str | None) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
  return parser


def device(*packages: str) -> dict[str, Any]:
  """The host, the version of Python and those of the packages."""
  return {
    "device": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
    "python": platform.python_version(),
    **{name: version(name) for name in packages},
  }


def peak_bytes() -> int:
  """The peak memory of this process, in bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(result: dict[str, Any], as_json: bool) -> None:
  """Prints a line for each number and, with as_json, one JSON object with all of them."""
  for name, value in result.items():
    print(f"{name:28} {value}")
  if as_json:
    print(json.dumps(result))


def _processor() -> str:
  info = Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.machine()
