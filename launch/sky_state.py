"""Prints the state of the newest managed job of a name, or none. For sky.sh.

sky jobs queue --all --output=json | python launch/sky_state.py NAME
"""

import json
import sys
from typing import Any


def state(jobs: list[dict[str, Any]], name: str) -> str:
  """Returns the state of the job with the highest number among those of this name; else "none"."""
  named = [job for job in jobs if job["job_name"] == name]
  return max(named, key=lambda job: job["job_id"])["status"] if named else "none"


if __name__ == "__main__":
  print(state(json.load(sys.stdin), sys.argv[1]))
