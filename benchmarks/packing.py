"""How full packed rows are, and how long the plan of a million clips takes.

python benchmarks/packing.py --json

Writes the index of an encoded dataset, without records, and opens it as training does: reads the
index, lays out the rows of all epochs, and draws the first epoch. Row lengths are those of the
paper's Table 5: about 25k, 75k and 700k tokens. The top-level figures are for 75k. `peer` is the
padding of Grain's best-fit packer with 64 open rows, on fewer clips.
"""

import logging
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import grain
import measure
import numpy as np
from etils import epath
from mix import ROWS, TEXT_SHAPE, draw_mix, latent_shapes, token_counts

from cogvideox_jax.data import packing
from cogvideox_jax.data.files import write_arrays
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.rows import Rows
from cogvideox_jax.data.shards import ShardWriter
from cogvideox_jax.types import Example

TOP = 75_776


def draw_example(name: str, latents: Sequence[int], text: tuple[int, int]) -> Example:
  """A clip with random latents and text states."""
  rng = np.random.default_rng(latents[0])
  mean, logvar = rng.standard_normal((2, *latents), np.float32)
  frames, height, width = 4 * latents[0] - 3, 8 * latents[1], 8 * latents[2]
  states = rng.standard_normal(text, np.float32)
  return Example(mean, logvar, states, "a caption", name, frames, height, width, 8.0)


def write_dataset(folder: epath.Path, latents: np.ndarray, text: tuple[int, int]) -> Dataset:
  """Writes clips with these (f, h, w, c) latents, in one shard."""
  writer = ShardWriter(folder, 1, "benchmark")
  shapes = enumerate(latents.tolist())
  writer.write_shard(0, (draw_example(f"{n}.mp4", shape, text) for n, shape in shapes))
  writer.finalize()
  return Dataset(folder)


def repeat_index(folder: epath.Path, copies: int, **changes: np.ndarray) -> None:
  """Rewrites a dataset's index to list each clip `copies` times, under different names."""
  arrays = dict(np.load(folder / "index.npz"))
  clips = copies * len(arrays["source_hash"])
  columns = {
    name: np.tile(array, (copies, *[1] * (array.ndim - 1)))
    for name, array in arrays.items()
    if array.ndim
  }
  names = {
    "source_hash": np.random.default_rng(1).integers(2**64, size=clips, dtype=np.uint64),
    "names": np.frombuffer(b"".join(b"%09d.mp4" % clip for clip in range(clips)), np.uint8),
    "name_ends": len("000000000.mp4") * np.arange(1, clips + 1),
  }
  write_arrays(folder / "index.npz", {**arrays, **columns, **names, **changes})


def write_index(folder: epath.Path, sizes: np.ndarray) -> None:
  """Writes as much of an encoded dataset as planning reads. sizes: (frames, height, width)."""
  write_dataset(folder, np.array([[1, 2, 2, 16]]), (1, 1))
  num_frames, height, width = sizes.astype(np.int32).T
  repeat_index(
    folder,
    len(sizes),
    num_frames=num_frames,
    height=height,
    width=width,
    latent_shape=latent_shapes(sizes),
    text_shape=np.tile(np.array(TEXT_SHAPE, np.int32), (len(sizes), 1)),
    shard_lengths=np.array([len(sizes)]),
    shard_bytes=np.load(folder / "index.npz")["shard_bytes"],
  )


def open_rows(folder: epath.Path, row_tokens: int) -> Rows:
  return Rows(
    Dataset(folder),
    row_tokens=row_tokens,
    max_clips=ROWS[row_tokens],
    patch=(1, 2, 2),
    seed=0,
    drop="zeros",
    drop_rate=0.1,
    validation_fraction=0.0,
  )


def plan(folder: epath.Path, row_tokens: int) -> dict[str, Any]:
  """Plans the rows from scratch, then again from the cached layout."""
  start, start_cpu = time.perf_counter(), time.process_time()
  rows = open_rows(folder, row_tokens)
  rows[0]
  planned, planned_cpu = time.perf_counter(), time.process_time()
  open_rows(folder, row_tokens)[1_000_000 * 16]
  resumed = time.perf_counter()
  packed = np.concatenate([rows[number].clips for number in range(rows.per_epoch)])
  everything = np.concatenate([packed, rows.unpackable])
  if not np.array_equal(np.sort(everything), np.arange(len(rows.dataset))):
    raise SystemExit("a clip was lost or repeated")
  tokens = int(rows.lengths[packed].sum())
  return {
    "row_tokens": row_tokens,
    "max_clips": rows.max_clips,
    "clips": len(packed),
    "unpackable": len(rows.unpackable),
    "rows": rows.per_epoch,
    "tokens": tokens,
    "padding_fraction": 1 - tokens / (rows.per_epoch * row_tokens),
    "plan_seconds": planned - start,
    "plan_cpu_seconds": planned_cpu - start_cpu,  # Unaffected by other work on the machine.
    "plan_again_seconds": resumed - planned,  # At step 1,000,000, from the cached layout.
  }


def peer(clips: int, row_tokens: int) -> dict[str, Any]:
  """Packs the same mix with Grain's packer and with ours. Grain's reads the clips, one by one."""
  lengths = token_counts(clips)
  tokens = grain.MapDataset.source(lengths.tolist()).map(
    lambda length: {"tokens": np.ones(length, np.int8)}
  )
  start = time.perf_counter()
  packer = grain.experimental.BestFitPackIterDataset(
    tokens.to_iter_dataset(grain.ReadOptions(0, 0)),
    length_struct={"tokens": row_tokens},
    num_packing_bins=64,
    max_sequences_per_bin=ROWS[row_tokens],
  )
  rows = sum(1 for _ in packer)
  packed = time.perf_counter()
  ours = packing.plan_layout(lengths, row_tokens, ROWS[row_tokens]).num_rows
  planned = time.perf_counter()
  return {
    "clips": clips,
    "grain_padding_fraction": 1 - int(lengths.sum()) / (rows * row_tokens),
    "grain_seconds": packed - start,
    "padding_fraction": 1 - int(lengths.sum()) / (ours * row_tokens),
    "plan_seconds": planned - packed,
  }


def main() -> None:
  parser = measure.arguments(__doc__)
  parser.add_argument("--clips", type=int, default=1_000_000)
  parser.add_argument(
    "--peer_clips", type=int, default=20_000, help="clips to compare with Grain's packer"
  )
  args = parser.parse_args()
  logging.getLogger("absl").setLevel(logging.ERROR)  # Clips too long for a row are in the result.
  with tempfile.TemporaryDirectory() as folder:
    write_index(epath.Path(folder), draw_mix(args.clips))
    plans = {row_tokens: plan(epath.Path(folder), row_tokens) for row_tokens in ROWS}
  result = {
    **measure.device("numpy", "grain"),
    **plans[TOP],
    "peak_bytes": measure.peak_bytes(),
    "all": list(plans.values()),
    "peer": peer(args.peer_clips, TOP),
  }
  measure.report(result, args.json)


if __name__ == "__main__":
  main()
