"""Starts a command as the processes of a job, as on several hosts, and waits for their end."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
STARTED: list[subprocess.Popen] = []


def start_job(verb: str, flags: list[str], count: int) -> list[subprocess.Popen]:
  """Starts `python -m cogvideox_jax.VERB FLAGS` in so many processes that meet on this machine."""
  command = [sys.executable, "-m", f"cogvideox_jax.{verb}", *flags]
  if count > 1:
    command += [f"--coordinator=127.0.0.1:{_free_port()}", f"--process_count={count}"]
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  processes = [
    subprocess.Popen(
      command + [f"--process_id={index}"] * (count > 1),
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(count)
  ]
  STARTED.extend(processes)
  return processes


def end_all() -> None:
  """Kills what a failed test left behind: a process may wait for another."""
  while STARTED:
    with STARTED.pop() as process:
      process.kill()


def finish(processes: list[subprocess.Popen], timeout: float = 120) -> tuple[list[int], list[str]]:
  """Returns the exit codes and what each process printed."""
  outputs = [process.communicate(timeout=timeout) for process in processes]
  return [process.returncode for process in processes], ["".join(output) for output in outputs]


def lines(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]
