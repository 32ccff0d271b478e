"""Starts a command as the processes of a job, as on several hosts, and waits for their end."""

import json
import socket
import tempfile
from pathlib import Path

from commands import OWN_DEVICES, Running, start_command

STARTED: list[tuple[Running, tempfile.TemporaryDirectory]] = []


def start_job(verb: str, flags: list[str], count: int) -> list[Running]:
  """Starts `python -m cogvideox_jax.VERB FLAGS` in so many processes that meet on this machine."""
  if count > 1:
    flags = [*flags, f"--coordinator=127.0.0.1:{_free_port()}", f"--process_count={count}"]
  processes = []
  for index in range(count):
    printed = tempfile.TemporaryDirectory(prefix="printed_")
    own = [f"--process_id={index}"] * (count > 1)
    process = start_command(Path(printed.name), verb, *flags, *own, xla_flags=OWN_DEVICES)
    STARTED.append((process, printed))
    processes.append(process)
  return processes


def end_all() -> None:
  """Kills what a failed test left behind: a process may wait for another."""
  while STARTED:
    process, printed = STARTED.pop()
    process.kill()
    printed.cleanup()


def finish(processes: list[Running]) -> tuple[list[int | None], list[str]]:
  """Returns the exit codes and what each process printed."""
  ended = [process.wait() for process in processes]
  return [result.code for result in ended], [result.output + result.errors for result in ended]


def lines(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]
