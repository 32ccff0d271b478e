"""How fast clips are decoded for the VAE's training, and in how much memory.

python benchmarks/clips.py --json

The clips are of 17x64x64, from real H.264 files: one clip a file, then several. The files have
many names but few contents, and the operating system holds them in its cache, so the benchmark
measures decoding and not the disk. An epoch of batches is taken as fast as they come. CPU seconds
count the decode processes too; memory is that of the process that trains.
"""

import json
import os
import resource
import tempfile
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import measure
import numpy as np

from cogvideox_jax.data import measured_clips
from cogvideox_jax.data.clip_batches import ClipBatches
from cogvideox_jax.data.decoding import Decoders
from cogvideox_jax.data.mp4 import write_mp4

FRAMES, SIDE, FPS = 17, 64, 8.0
CONTENTS = 32  # Distinct files.


def write_files(folder: Path, clips: int, clips_per_file: int) -> None:
  """Writes a manifest of as many names as hold the clips; a moving gradient, some noise."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  names = [f"{number}.mp4" for number in range(-(-clips // clips_per_file))]
  y, x = np.mgrid[:SIDE, :SIDE]
  for number, name in enumerate(names):
    if number < CONTENTS:
      time_, colour = np.arange(FRAMES * clips_per_file), rng.uniform(0, 255, 3)
      wave = np.sin((x + y)[None] / 9 + time_[:, None, None] / 3 + number)
      frames = wave[..., None] * 60 + colour + rng.normal(0, 4, (len(time_), SIDE, SIDE, 3))
      write_mp4(folder / name, frames.clip(0, 255).astype(np.uint8), FPS)
    else:
      os.link(folder / names[number % CONTENTS], folder / name)
  lines = [json.dumps({"file": name, "caption": "a wave"}) + "\n" for name in names]
  (folder / "manifest.jsonl").write_text("".join(lines))


def cpu_seconds() -> float:
  """CPU seconds of this process and of its children that have ended."""
  usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure_epoch(folder: Path, workers: int, batch_frames: int) -> dict[str, Any]:
  """Times the measuring of all files, then an epoch of batches."""
  start, start_cpu = time.perf_counter(), cpu_seconds()
  with Decoders(workers) as decoders:
    clips = measured_clips.measure(folder, ((SIDE, SIDE),), (FRAMES,), FPS, decoders)
  measured, measured_cpu = time.perf_counter(), cpu_seconds()
  with Decoders(workers) as decoders:
    batches = ClipBatches(clips, decoders, frames=batch_frames, seed=0)
    with closing(batches.iterate()) as iterator:
      for _ in islice(iterator, batches.per_epoch):
        pass
  seconds, cpu = time.perf_counter() - measured, cpu_seconds() - measured_cpu
  return {
    "clips": clips.num_clips,
    "files": len(clips.files),
    "workers": workers,
    "batches": batches.per_epoch,
    "measure_seconds": measured - start,
    "measure_cpu_ms_per_file": (measured_cpu - start_cpu) / len(clips.files) * 1e3,
    "clips_per_second": clips.num_clips / seconds,
    "cpu_ms_per_clip": cpu / clips.num_clips * 1e3,
  }


def main() -> None:
  parser = measure.arguments(__doc__)
  parser.add_argument("--clips", type=int, default=10_000)
  parser.add_argument("--clips_per_file", type=int, nargs="+", default=[1, 4])
  parser.add_argument("--batch_frames", type=int, default=64)
  parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
  args = parser.parse_args()
  runs = []
  with tempfile.TemporaryDirectory() as temporary:
    for count in args.clips_per_file:
      folder = Path(temporary) / str(count)
      write_files(folder, args.clips, count)
      runs.append(
        {"clips_per_file": count, **measure_epoch(folder, args.workers, args.batch_frames)}
      )
  frame_bytes = args.clips * FRAMES * SIDE * SIDE * 3
  peak = {"frame_bytes": frame_bytes, "peak_bytes": measure.peak_bytes()}
  measure.report({**measure.device("av", "numpy"), **peak, "runs": runs}, args.json)


if __name__ == "__main__":
  main()
