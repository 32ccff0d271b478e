"""How fast training rows are read, unpacked, packed, batched and handed to the device.

python benchmarks/loader.py --json

Two datasets have records of real sizes (float16 latents, bfloat16 text states): `mix`, from
benchmarks/mix.py, and `480p`, clips of 49x480x720 only. The files are new, so the operating system
reads them from its cache: the benchmark measures the host's work, not its disk. With one worker the
process is pinned to one core, with two to two cores. The top-level figures are those of the slower
dataset with one worker.

Also measures the time to the first batch at step 1,000,000 of a dataset of a million clips, and the
growth of the process over many batches of small rows.
"""

import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import measure
import numpy as np
from etils import epath
from mix import ROWS, TEXT_SHAPE, draw_mix, latent_shapes
from packing import TOP, repeat_index, write_dataset

from cogvideox_jax.data import mixture
from cogvideox_jax.data.loader import Loader
from cogvideox_jax.data.records import Dataset, shard_name
from cogvideox_jax.data.rows import Rows

PEAK, MFU = 459e12, 0.45  # A v5p chip's bf16 FLOP/s, and how well training uses it.
CLIP_TOKENS, CLIP_FLOPS = 17_776, 997e12  # 5B training on one clip of 49x480x720.
CLIP_BYTES = 2 * 2 * 13 * 60 * 90 * 16 + 2 * 226 * 4096  # Mean and log-variance, text states.
HEADROOM = 5
LOCAL_ROWS = 2  # Rows in a host's batch.
REPEATS = 5
DATASETS = {"mix": (96, ROWS[TOP]), "480p": (32, 8)}  # Clips, and the most clips of a row.
CORES = sorted(os.sched_getaffinity(0))
COPIES = 1000  # How often the shard is repeated for a dataset of a million clips.


def needed() -> dict[str, float]:
  """What the loader must deliver for each chip: HEADROOM times what 5B training on a v5p takes."""
  clips = HEADROOM * PEAK * MFU / CLIP_FLOPS
  return {
    "needed_tokens_per_second": clips * CLIP_TOKENS,
    "needed_bytes_per_second": clips * CLIP_BYTES,
  }


def write_large(folder: epath.Path, clips: int) -> None:
  """Writes a dataset of small clips whose shards are all links to one file."""
  write_small(folder, clips)
  for copy in range(COPIES):
    os.link(folder / shard_name(0, 1), folder / shard_name(copy, COPIES))
  repeat_index(folder, COPIES)


def write_small(folder: epath.Path, clips: int) -> Dataset:
  shapes = np.column_stack([np.arange(clips) % 13 + 1, np.full((clips, 2), 4), np.full(clips, 4)])
  return write_dataset(folder, shapes, (8, 4))


def make_loader(dataset: Dataset, *, row_tokens: int, max_clips: int, **options) -> Loader:
  rows = Rows(
    dataset,
    row_tokens=row_tokens,
    max_clips=max_clips,
    patch=(1, 2, 2),
    seed=0,
    drop="zeros",
    drop_rate=0.1,
    validation_fraction=0.0,
  )
  return Loader({"clips": rows}, mixture.begin({"clips": 1}), rows=LOCAL_ROWS, **options)


def measure_speed(dataset: Dataset, max_clips: int, workers: int, batches: int) -> dict[str, Any]:
  """Times batches from the records to the device, as the training takes them; medians."""
  os.sched_setaffinity(0, CORES[:workers])  # Threads inherit it.
  loader = make_loader(dataset, row_tokens=TOP, max_clips=max_clips, num_threads=workers)
  clips = [len(loader.row(index).row.clips) for index in range(batches * LOCAL_ROWS)]
  tokens = sum(TOP * LOCAL_ROWS * (1 - loader.padding_fraction(k)) for k in range(batches))
  seconds, cpu_seconds, size = [], [], 0
  for _ in range(REPEATS):
    start, start_cpu = time.perf_counter(), time.process_time()
    for batch in itertools.islice(loader.iterate(), batches):
      jax.block_until_ready(jax.device_put(batch))
      size = sum(array.nbytes for array in jax.tree.leaves(batch))
    seconds.append(time.perf_counter() - start)
    cpu_seconds.append(time.process_time() - start_cpu)
  median = statistics.median(seconds)
  return {
    "workers": workers,
    "clips_per_row": sum(clips) / len(clips),
    "tokens_per_second": tokens / median,
    "rows_per_second": batches * LOCAL_ROWS / median,
    "bytes_per_second": _record_bytes(dataset, loader, batches) / median,
    # By CPU time: the speed of a core that does nothing else, even if the machine was busy.
    "tokens_per_cpu_second": tokens / statistics.median(cpu_seconds),
    "batch_bytes": size,
    "fastest_over_median": min(seconds) / median,
  }


def _record_bytes(dataset: Dataset, loader: Loader, batches: int) -> int:
  """Bytes of latents and text states in the records of the first batches."""
  each = 2 * (2 * dataset.index.latent_shape.prod(axis=1) + dataset.index.text_shape.prod(axis=1))
  rows = [loader.row(index).row.clips for index in range(batches * LOCAL_ROWS)]
  return int(sum(each[clips].sum() for clips in rows))


def measure_resume(folder: epath.Path, clips: int) -> dict[str, float]:
  """Seconds from opening a dataset to its first batch at step 1,000,000."""
  write_large(folder, clips // COPIES)
  times = {}
  for name in ("unplanned_", ""):
    start, start_cpu = time.perf_counter(), time.process_time()
    loader = make_loader(Dataset(folder), row_tokens=256, max_clips=16)
    batches = loader.iterate(1_000_000)
    next(batches)
    times[f"{name}resume_seconds"] = time.perf_counter() - start
    times[f"{name}resume_cpu_seconds"] = time.process_time() - start_cpu
    batches.close()
  return times


def measure_growth(folder: epath.Path, batches: int) -> dict[str, int]:
  """Bytes by which the process grows from a tenth of the batches to the last batch."""
  loader = make_loader(write_small(folder, 500), row_tokens=256, max_clips=16)
  before = 0
  for k, _ in enumerate(itertools.islice(loader.iterate(), batches)):
    if k == batches // 10:
      before = _resident_bytes()
  return {"batches": batches, "growth_bytes": _resident_bytes() - before}


def _resident_bytes() -> int:
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
  parser = measure.arguments(__doc__)
  parser.add_argument("--batches", type=int, default=16, help="batches in a timed repeat")
  parser.add_argument("--growth_batches", type=int, default=10_000)
  parser.add_argument("--clips", type=int, default=1_000_000, help="clips in the resumed dataset")
  args = parser.parse_args()
  runs = []
  with tempfile.TemporaryDirectory() as temporary:
    folder = epath.Path(temporary)
    for name, (clips, max_clips) in DATASETS.items():
      sizes = draw_mix(clips) if name == "mix" else np.tile([49, 480, 720], (clips, 1))
      dataset = write_dataset(folder / name, latent_shapes(sizes), TEXT_SHAPE)
      runs += [
        {"dataset": name, **measure_speed(dataset, max_clips, workers, args.batches)}
        for workers in (1, 2)
      ]
    os.sched_setaffinity(0, CORES)
    resume = measure_resume(folder / "large", args.clips)
    growth = measure_growth(folder / "small", args.growth_batches)
  slowest = min(
    (run for run in runs if run["workers"] == 1), key=lambda run: run["tokens_per_second"]
  )
  result = {
    **measure.device("jax", "grain", "array-record", "numpy"),
    "to": jax.devices()[0].device_kind,
    "row_tokens": TOP,
    **needed(),
    **slowest,
    **resume,
    **growth,
    "peak_bytes": measure.peak_bytes(),
    "runs": runs,
  }
  measure.report(result, args.json)


if __name__ == "__main__":
  main()
