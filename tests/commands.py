"""Runs the real commands as a user does, but from a process that has loaded the libraries."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

# The libraries, and nothing else, are loaded once for all commands.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["cogvideox_jax.encoding", "cogvideox_jax.training.transformer_run"])


class Result(NamedTuple):
  code: int | None
  output: str
  errors: str


def run_command(folder: Path, verb: str, *args: str) -> Result:
  """`python -m cogvideox_jax.VERB ARGS`; what it prints goes to files in the folder."""
  process = FORKS.Process(target=_start, args=(verb, list(args), folder))
  process.start()
  process.join(timeout=120)
  texts = [(folder / name).read_text() for name in ("output", "errors")]
  return Result(process.exitcode, *texts)


def _start(verb: str, args: list[str], folder: Path) -> None:
  """What a command's process does."""
  for stream, name in ((1, "output"), (2, "errors")):
    os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
  os.environ["JAX_LOG_COMPILES"] = "1"
  sys.argv = [verb, *args]
  runpy.run_module(f"cogvideox_jax.{verb}", run_name="__main__", alter_sys=True)
