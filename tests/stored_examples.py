"""Encoded clips that are drawn, and small datasets of them."""

import ml_dtypes
import numpy as np

from cogvideox_jax.data import shard_notes
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.shards import ShardWriter
from cogvideox_jax.types import Caption, Example


def draw_example(number: int, *, frames: int = 3) -> Example:
  rng = np.random.default_rng(number)
  shape = (frames, 4, 6, 16)
  return Example(
    mean=rng.normal(size=shape).astype(np.float32),
    logvar=rng.uniform(-30, 20, size=shape).astype(np.float32),
    text=rng.normal(size=(5, 8)).astype(np.float32),
    caption=f"a célebre clip, number {number} 🎬",
    source=f"clip-{number}",
    num_frames=4 * frames - 3,
    height=32,
    width=48,
    fps=7.5,
  )


def write_dataset(directory, examples, *, clips_in_a_shard=3) -> Dataset:
  starts = range(0, len(examples), clips_in_a_shard)
  writer = ShardWriter(directory, len(starts), shard_notes.identity("test"))
  for shard, start in enumerate(starts):
    writer.write_shard(shard, examples[start : start + clips_in_a_shard])
  writer.finalize()
  return Dataset(directory)


def assert_stored(found: Example, example: Example):
  """Equal up to the rounding of the types they are stored in."""
  assert found.mean.dtype == found.logvar.dtype == np.float16
  assert found.text.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(found.mean, example.mean.astype(np.float16))
  np.testing.assert_array_equal(found.logvar, example.logvar.astype(np.float16))
  np.testing.assert_array_equal(found.text, example.text.astype(ml_dtypes.bfloat16))
  assert found[3:] == example[3:]


def draw_captioned(number: int, captions: int, score: float | None) -> Example:
  rng = np.random.default_rng(number)
  others = (Caption(f"another, {k}", rng.normal(size=(5, 8))) for k in range(captions - 1))
  return draw_example(number)._replace(score=score, others=tuple(others))
