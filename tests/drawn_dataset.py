"""An encoded dataset whose every number says which clip it belongs to."""

import numpy as np

from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.rows import Rows
from cogvideox_jax.data.shards import ShardWriter
from cogvideox_jax.types import VISION, Batch, Example

ROW_TOKENS, MAX_CLIPS = 120, 5
SIZES = [(8, 8), (6, 10), (10, 6)]


def draw_example(number: int, score: float | None = None) -> Example:
  """A clip whose latents and text states are its number + 1."""
  frames, (height, width) = (1, 3, 5)[number % 3], SIZES[number // 3 % 3]
  mean = np.full((frames, height, width, 2), number + 1, np.float32)
  text = np.full((8, 4), number + 1, np.float32)
  source = f"clip-{number}"
  return Example(mean, -mean, text, "", source, 4 * frames - 3, 8 * height, 8 * width, 8.0, score)


def make_dataset(directory, numbers, shards: int = 1, scores=None) -> Dataset:
  """scores: of the clips, by their numbers."""
  writer = ShardWriter(directory, shards, "test")
  for shard, part in enumerate(np.array_split(numbers, shards)):
    writer.write_shard(shard, [draw_example(int(n), scores and scores[n]) for n in part])
  writer.finalize()
  return Dataset(directory)


def make_rows(dataset: Dataset, **changes) -> Rows:
  arguments = {
    "row_tokens": ROW_TOKENS,
    "max_clips": MAX_CLIPS,
    "patch": (1, 2, 2),
    "seed": 7,
    "drop": "zeros",
    "drop_rate": 0.1,
    "validation_fraction": 0.0,
  }
  return Rows(dataset, **{**arguments, **changes})


def assert_equal(one: Batch, other: Batch):
  for name, a, b in zip(Batch._fields, one, other, strict=True):
    np.testing.assert_array_equal(a, b, err_msg=name)


def numbers_of(batch: Batch) -> list[list[int]]:
  """Which clips stand in each row, read from the latents themselves."""
  rows = []
  for mean, experts, segment_ids in zip(batch.mean, batch.experts, batch.segment_ids, strict=True):
    clips = []
    for segment in range(1, segment_ids.max() + 1):
      (value,) = set(mean[(segment_ids == segment) & (experts == VISION)].flat)
      clips.append(int(value) - 1)
    rows.append(clips)
  return rows
