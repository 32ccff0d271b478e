"""Compiled programs are kept from start to start."""

import os
import subprocess
import sys

import jax
import pytest
from in_process import run_here

from cogvideox_jax import compiled_programs
from cogvideox_jax.errors import UserError

PROGRAM = """
import sys
from cogvideox_jax import compiled_programs
compiled_programs.keep(*sys.argv[1:])
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
jax.jit(lambda x: jnp.tanh(x @ x) + 1)(jnp.ones((8, 8)))
print(sum("cache_hits" in event for event in hits), sum("cache_misses" in event for event in hits))
"""


@pytest.fixture
def settings(monkeypatch):
  """The settings of JAX that `keep` has changed, by name; it changes none for other tests."""
  changed = {}
  monkeypatch.setattr(jax.config, "update", changed.__setitem__)
  monkeypatch.setattr(compiled_programs.compilation_cache, "reset_cache", lambda: None)
  return changed


def start(*args, **environment):
  """Hits and misses of a process that compiles one program."""
  environment = {key: value for key, value in (os.environ | environment).items() if value}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, *args], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return tuple(map(int, done.stdout.split()))


def test_a_second_start_compiles_nothing_and_a_changed_version_all(tmp_path):
  folder = str(tmp_path / "programs")
  none = {"JAX_COMPILATION_CACHE_DIR": ""}
  hits, misses = start(folder, **none)
  assert hits == 0 and misses > 0
  assert start(folder, **none) == (misses, 0)
  # As another compiler would: its options are part of the name.
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_fast_min_max=true"
  assert start(folder, **none, XLA_FLAGS=flags)[0] == 0


def test_what_is_given_comes_before_the_variable_and_that_before_the_rest(
  settings, monkeypatch, tmp_path
):
  home, shared, given = (str(tmp_path / name) for name in ("home", "shared", "given"))
  monkeypatch.setenv("COGVIDEOX_JAX_CACHE", home)
  monkeypatch.setenv(compiled_programs.VARIABLE, "/variable")
  compiled_programs.keep("", shared)
  assert not settings
  compiled_programs.keep(given, shared)
  assert os.path.dirname(settings["jax_compilation_cache_dir"]) == given
  monkeypatch.delenv(compiled_programs.VARIABLE)
  compiled_programs.keep("", shared)
  assert settings["jax_compilation_cache_dir"].startswith(shared)
  compiled_programs.keep("")
  assert settings["jax_compilation_cache_dir"].startswith(home)
  compiled_programs.keep("off")
  assert settings["jax_enable_compilation_cache"] is False


def test_a_folder_that_cannot_be_written_is_an_error_only_if_it_was_given(
  settings, monkeypatch, tmp_path
):
  (tmp_path / "file").write_text("")
  monkeypatch.delenv(compiled_programs.VARIABLE, raising=False)
  monkeypatch.setenv("COGVIDEOX_JAX_CACHE", str(tmp_path / "file"))
  compiled_programs.keep("")
  assert not settings
  with pytest.raises(UserError, match="cannot be written"):
    compiled_programs.keep(str(tmp_path / "file" / "below"))


def test_machines_with_other_cores_share_nothing(settings, monkeypatch, tmp_path):
  folders = set()
  for flags in ("flags : sse avx", "flags : sse avx avx512f"):
    monkeypatch.setattr(compiled_programs.Path, "read_text", lambda _, flags=flags: flags)
    compiled_programs.keep(str(tmp_path))
    folders.add(settings["jax_compilation_cache_dir"])
  assert len(folders) == 2


def test_commands_take_the_folder(monkeypatch, capfd, settings, tmp_path):
  run_here(
    monkeypatch, capfd, "evaluate", "vea", f"--compilation_cache={tmp_path / 'x'}", "--model=tiny"
  )
  assert settings["jax_compilation_cache_dir"].startswith(str(tmp_path / "x"))
