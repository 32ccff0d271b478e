"""Times our programs and PyTorch's in turn, and measures the memory of each in its own process."""

import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

# The most that outputs may differ: the norm of the difference over the norm of PyTorch's output.
AGREE = {"float32": 1e-4, "bfloat16": 3e-2}
TORCH_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Run = Callable[[], Any]  # Runs a program once and waits until it has finished.


def synchronize() -> None:
  """Waits until PyTorch has finished its work on a GPU."""
  if TORCH_DEVICE.type == "cuda":
    torch.cuda.synchronize()


def device_names() -> dict[str, Any]:
  """The devices of both libraries, and PyTorch's threads."""
  return {
    "on": jax.devices()[0].device_kind,
    "torch_on": torch.cuda.get_device_name() if TORCH_DEVICE.type == "cuda" else "cpu",
    "threads": torch.get_num_threads(),
  }


def check_agreement(expected: np.ndarray, found: np.ndarray, dtype: str) -> float:
  """The norm of the difference over the norm of the expected; ends the run if it is too large."""
  error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
  if not error < AGREE[dtype]:
    raise SystemExit(f"the outputs differ by {error:.1e} of their norm: nothing was timed")
  return error


def time_in_turn(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
  """Seconds of each repeat, after two runs that do not count."""
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for repeat in range(-2, repeats):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      if repeat >= 0:
        seconds[name].append(time.perf_counter() - start)
  return seconds


def compared(taken: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
  """Median, least and most seconds, and each program's ratio to our program of the same name."""
  seconds = {name: statistics.median(values) for name, values in taken.items()}
  return {
    "seconds": seconds,
    "spread": {name: [min(values), max(values)] for name, values in taken.items()},
    "ratios": _ratios(seconds),
    "ratios_of_fastest": _ratios({name: min(values) for name, values in taken.items()}),
  }


def _ratios(seconds: dict[str, float]) -> dict[str, float]:
  ours = {name: f"ours_{name.rpartition('_')[2]}" for name in seconds}
  return {
    name: seconds[name] / seconds[twin]
    for name, twin in ours.items()
    if name != twin and twin in seconds
  }


def peak_memory(make: Callable[[], Run], *, of_torch: bool) -> int:
  """The most bytes by which a separate process grows while it runs a program."""
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    return pool.apply(_growth, (make, of_torch))


def _growth(make: Callable[[], Run], of_torch: bool) -> int:
  run = make()
  if TORCH_DEVICE.type == "cuda" and of_torch:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before
  if jax.default_backend() != "cpu":
    before = jax.devices()[0].memory_stats()["bytes_in_use"]
    run()
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"] - before
  before, seen, done = _resident_bytes(), [0], threading.Event()

  def watch() -> None:
    while not done.wait(0.002):
      seen.append(_resident_bytes())

  watcher = threading.Thread(target=watch)
  watcher.start()
  run()
  done.set()
  watcher.join()
  return max(seen) - before


def _resident_bytes() -> int:
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE")
