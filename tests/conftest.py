"""Every test runs on eight fake CPU devices. Set before anything imports jax.

All processes of a run, workers of xdist and commands alike, share one cache of compiled programs,
and one of the weights that metrics use.
"""

import atexit
import gc
import os
import subprocess
import tempfile
from types import SimpleNamespace

import pytest

FLAGS = {
  "xla_force_host_platform_device_count": 8,
  # Seconds that fake devices wait for one another before XLA aborts; by default 40, which a machine
  # with other work to do may take.
  "xla_cpu_collective_call_terminate_timeout_seconds": 600,
}

os.environ["JAX_PLATFORMS"] = "cpu"
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
  [given, *(f"--{name}={value}" for name, value in FLAGS.items() if name not in given)]
).strip()
# As `sharding.split_cpu` does. With a thread for each core, a device that waits for another one may
# hold the thread that the other one needs: tests stood still until XLA aborted the process.
os.environ.setdefault("NPROC", "32")
# A worker for each core leaves none for more threads, which would wait for one another by spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  COMPILED = tempfile.TemporaryDirectory(prefix="compiled_", ignore_cleanup_errors=True)
  atexit.register(COMPILED.cleanup)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"

if "COGVIDEOX_JAX_CACHE" not in os.environ:
  CONVERTED = tempfile.TemporaryDirectory(prefix="converted_", ignore_cleanup_errors=True)
  atexit.register(CONVERTED.cleanup)
  os.environ["COGVIDEOX_JAX_CACHE"] = CONVERTED.name


def pytest_collection_finish():
  """Spares the collector what all tests share: a million objects of the libraries, which stay.

  Otherwise each full collection walks through them, several times in a test that traces a model.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 50)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
  """A `FinishedRun`, which is the same for all workers."""
  import finished_run

  return finished_run.finished_run(tmp_path_factory)


@pytest.fixture
def abandoned_writes(request):
  """Collects the writes that Orbax abandons when a save fails, each with a warning of Python's.

  Otherwise they would be collected, and the warning be an error, in whatever test runs by then.
  """
  request.node.add_marker(pytest.mark.filterwarnings("ignore:coroutine .* was never awaited"))
  yield
  gc.collect()


@pytest.fixture
def forked_torch(monkeypatch, tmp_path_factory):
  """PyTorch, which takes seconds to load, is there when a process begins to read its files."""
  from commands import start_module

  from cogvideox_jax.conversion import torch_files

  def run(command, **_):
    folder = tmp_path_factory.mktemp("said")
    ended = start_module(folder, *command[2:]).wait()  # After `python -m`.
    return subprocess.CompletedProcess(command, ended.code, ended.output, ended.errors)

  monkeypatch.setattr(torch_files, "subprocess", SimpleNamespace(run=run))
