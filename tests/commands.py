"""Runs the real commands as a user does, but from a process that has loaded the libraries."""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from waiting import PATIENCE

from cogvideox_jax.precompute import encode_clips
from cogvideox_jax.training import transformer_run

# The libraries, and nothing else, are loaded once for all commands.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
  [encode_clips.__name__, transformer_run.__name__, "torch", "safetensors.torch"]
)
# Without the number of fake devices, so that a command has as many as its config says.
OWN_DEVICES = " ".join(
  flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag
)


class Result(NamedTuple):
  code: int | None
  output: str
  errors: str


class Running:
  """A function in a process of its own; what it prints goes to two files in a folder.

  The libraries are loaded when the process starts, so of the environment only what they read later
  can be changed, such as `xla_flags`. By default it is that of the tests.
  """

  def __init__(
    self, folder: Path, function: Callable, *args, xla_flags: str | None = None, **options
  ):
    self._files = [Path(folder) / "output", Path(folder) / "errors"]
    for file in self._files:
      file.write_text("")
    flags = os.environ["XLA_FLAGS"] if xla_flags is None else xla_flags
    self._process = FORKS.Process(
      target=_start, args=(self._files, flags, partial(function, *args, **options))
    )
    self._process.start()

  @property
  def errors(self) -> str:
    """What it has printed there so far."""
    return self._files[1].read_text()

  def poll(self) -> int | None:
    """Its exit code, or the negative number of the signal that ended it; None while it runs."""
    return self._process.exitcode

  def send_signal(self, number: signal.Signals):
    os.kill(self._process.pid, number)

  def kill(self):
    self._process.kill()
    self._process.join()

  def wait(self) -> Result:
    """Waits for its end; kills it, and raises TimeoutError, where that does not come."""
    self._process.join(PATIENCE)
    if self.poll() is None:
      self.kill()
      raise TimeoutError(self.errors)
    return Result(self.poll(), *(file.read_text() for file in self._files))


def start_module(folder: Path, module: str, *args: str, **options) -> Running:
  """`python -m MODULE ARGS`, not waited for. options: of `_run_module`, and `xla_flags`."""
  return Running(folder, _run_module, module, args, **options)


def start_command(folder: Path, verb: str, *args: str, **options) -> Running:
  """`python -m cogvideox_jax.VERB ARGS`, not waited for; options as `start_module` has them."""
  return start_module(folder, f"cogvideox_jax.{verb}", *args, **options)


def run_command(folder: Path, verb: str, *args: str, **options) -> Result:
  """`python -m cogvideox_jax.VERB ARGS`, to its end; options as `start_module` has them."""
  return start_command(folder, verb, *args, **options).wait()


def run_script(folder: Path, script: Path, *args: str, cwd: Path) -> Result:
  """`python SCRIPT ARGS` in the folder `cwd`, to its end."""
  return Running(folder, _run_script, script, args, cwd).wait()


def _start(files: list[Path], flags: str, function: Callable[[], None]) -> None:
  """What the process does."""
  for stream, file in enumerate(files, start=1):
    os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
  os.environ["XLA_FLAGS"] = flags
  gc.freeze()  # Otherwise a collection would touch, and so copy, every page of the libraries.
  try:
    function()
  finally:
    atexit._run_exitfuncs()  # As any Python does at its end; those that are forked do not.


def _run_module(module: str, args: tuple[str, ...], log_compiles: bool = False) -> None:
  jax.config.update("jax_log_compiles", log_compiles)
  sys.argv = [module, *args]
  runpy.run_module(module, run_name="__main__", alter_sys=True)


def _run_script(script: Path, args: tuple[str, ...], cwd: Path) -> None:
  os.chdir(cwd)
  sys.argv = [str(script), *args]
  runpy.run_path(str(script), run_name="__main__")
