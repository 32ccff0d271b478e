"""Runs a command inside the test's own process, for tests that end before any real work."""

import contextlib
import os
import runpy
import sys
import warnings
from collections.abc import Iterator

from absl import app, flags
from absl.testing import flagsaver
from commands import Result

from cogvideox_jax import command, hosts, interrupts, job, model_flags, sharding

# The flags of modules that are imported once, whatever commands run.
SHARED = [
  flag.name
  for module in (command, job, model_flags)
  for flag in vars(module).values()
  if isinstance(flag, flags.FlagHolder)
]


def run_here(
  monkeypatch, capfd, verb: str, *args: str, folder: str | os.PathLike[str] | None = None
) -> Result:
  """`python -m cogvideox_jax.VERB ARGS` in a folder, to its end. The flags are as before, then.

  Errors that a command does not explain are raised, as anywhere in a test.
  """
  module = f"cogvideox_jax.{verb}"
  with monkeypatch.context() as patch, _no_flags_of_commands(), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # As of a user's Python.
    patch.setattr(sys, "argv", [module, *args])
    patch.setattr(sys, "path", list(sys.path))
    patch.setattr(app._run_init, "done", True)
    # JAX is running already, with the devices of the tests.
    patch.setattr(hosts, "join", lambda group: None)
    patch.setattr(sharding, "split_cpu", lambda count: None)
    patch.setattr(interrupts, "leave_on_signals", lambda: None)
    if folder is not None:
      patch.chdir(folder)
    capfd.readouterr()
    code: object = None
    try:
      runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
      code = leaving.code
  printed = capfd.readouterr()
  return Result(code if isinstance(code, int) else 0, printed.out, printed.err)


@contextlib.contextmanager
def _no_flags_of_commands() -> Iterator[None]:
  """Takes away the flags of commands that a test has imported, until the end."""
  registry = vars(flags.FLAGS)
  kept = {name: _copy(x) if isinstance(x, dict) else x for name, x in registry.items()}
  values = flagsaver.save_flag_values()
  for name in list(flags.FLAGS):
    # The hook that checks shapes stands between `path_flags` and the command that calls it.
    module = flags.FLAGS.find_module_defining_flag(name).split(".")[0]
    if name not in SHARED and module in ("cogvideox_jax", "jaxtyping", "ml_collections"):
      delattr(flags.FLAGS, name)
  flags.FLAGS.unparse_flags()
  try:
    yield
  finally:
    registry.update(kept)
    flagsaver.restore_flag_values(values)


def _copy(table: dict) -> dict:
  return {key: list(x) if isinstance(x, list) else x for key, x in table.items()}
