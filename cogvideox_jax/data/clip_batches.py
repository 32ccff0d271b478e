"""Batches of clips as pixels, decoded from the files while training runs.

The decode processes work some batches ahead of the one that is taken, so that memory does not
grow with the number of clips.

Batch k is a function of (clips, seed, k) alone. In an epoch, each bucket's clips are permuted and
cut into batches of one size, the last of which is filled from the front of the same permutation;
then the batches of all buckets are shuffled. So an epoch holds every clip, training may start at
any step, and neither the number of processes nor that of hosts changes what a batch holds.
"""

import functools
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8, UInt64

from cogvideox_jax.data.buckets import Bucket
from cogvideox_jax.data.clip_reading import Choice, Reading, Source, read_ahead
from cogvideox_jax.data.decoding import Decoders
from cogvideox_jax.data.measured_clips import MeasuredClips
from cogvideox_jax.data.packing import random_words

RATE_FOLD = 1  # Parts the bits that choose frame rates from those that order the clips.

RowsOf = Callable[[int], Sequence[int]]  # Clips of a batch -> the numbers of a host's rows in it.


class BatchSize(NamedTuple):
  """The shape of a batch."""

  bucket: Bucket
  clips: int  # Rows of the global batch.


class _Epoch(NamedTuple):
  """The batches of one epoch, in their order."""

  permutations: Mapping[Bucket, Int[np.ndarray, " clips"]]  # The clips of each bucket.
  words: Mapping[Bucket, UInt64[np.ndarray, " clips"]]  # Bits that choose each clip's frame rate.
  buckets: Int[np.ndarray, " batches"]  # The number of each batch's bucket,
  numbers: Int[np.ndarray, " batches"]  # and which of the bucket's batches it is.


class ClipBatches:
  """An endless sequence of batches, each of clips of one bucket."""

  def __init__(
    self,
    clips: MeasuredClips,
    decoders: Decoders,
    *,
    frames: int,  # Pixel frames of a batch, at most; but never fewer than `multiple_of` clips.
    seed: int,
    multiple_of: int = 1,  # The clips of a batch divide by it: the shards of its rows.
  ):
    """Raises ValueError if there are no clips."""
    if not clips.num_clips:
      raise ValueError("there are no clips to make batches of")
    self._seed, self._source = seed, Source(clips, decoders)
    self._clips = {bucket: len(found.files) for bucket, found in clips.by_bucket.items()}
    self._sizes = [
      BatchSize(bucket, max(frames // bucket.num_frames // multiple_of, 1) * multiple_of)
      for bucket in self._clips
    ]
    self._batches = [-(-self._clips[size.bucket] // size.clips) for size in self._sizes]
    self._lock = threading.Lock()
    self._plan = functools.lru_cache(maxsize=2)(self._plan_epoch)

  @property
  def per_epoch(self) -> int:
    """Batches of an epoch."""
    return sum(self._batches)

  def epoch(self, k: int) -> int:
    """The epoch, from 0, that batch k belongs to."""
    return k // self.per_epoch

  def sizes_of(self, k: int) -> BatchSize:
    """The shape of batch k; decodes nothing."""
    return self._sizes[self._epoch_plan(self.epoch(k)).buckets[k % self.per_epoch]]

  def clips(self, k: int) -> list[str]:
    """Returns the names of the files that batch k takes its clips from, as far as they decode."""
    plan, size = self._epoch_plan(self.epoch(k)), self.sizes_of(k)
    permutation = plan.permutations[size.bucket]
    first = plan.numbers[k % self.per_epoch] * size.clips
    chosen = permutation[(first + np.arange(size.clips)) % len(permutation)]
    return self._source.names(size.bucket, chosen.tolist())

  def batch(self, k: int, rows: RowsOf | None = None) -> UInt8[np.ndarray, "b F H W 3"]:
    """Decodes batch k. Arguments and errors are those of `iterate`."""
    return self.start(k, rows).result()

  def iterate(
    self, start: int = 0, rows: RowsOf | None = None
  ) -> Generator[UInt8[np.ndarray, "b F H W 3"], None, None]:
    """Yields batch start, start + 1 and so on without end, decoded ahead.

    Close it (`.close()`, or let it go out of scope) to stop decoding ahead.

    Args:
      rows: which rows of a batch of that many clips this host wants; None is all of them.

    Raises:
      UserError: none of a bucket's clips can be decoded any more.
    """
    return read_ahead(lambda k: self.start(k, rows), start)

  def start(self, k: int, rows: RowsOf | None, avoided: frozenset[str] = frozenset()) -> Reading:
    """Starts to decode batch k.

    Args:
      avoided: names of files whose clips give their place to others.
    """
    plan, slot, size = self._epoch_plan(self.epoch(k)), k % self.per_epoch, self.sizes_of(k)
    mine = np.arange(size.clips) if rows is None else np.asarray(rows(size.clips))
    permutation = plan.permutations[size.bucket]
    first = (plan.numbers[slot] * size.clips + mine) % len(permutation)
    choice = Choice(size.bucket, permutation, plan.words[size.bucket], avoided)
    return Reading(self._source, choice, first)

  def _epoch_plan(self, epoch: int) -> _Epoch:
    with self._lock:  # Otherwise all threads that reach a new epoch would plan it.
      return self._plan(epoch)

  def _plan_epoch(self, epoch: int) -> _Epoch:
    def shuffled(count: int, *key: int) -> Int[np.ndarray, " count"]:
      return np.argsort(random_words(count, self._seed, epoch, *key), kind="stable")

    order = shuffled(self.per_epoch)
    return _Epoch(
      {bucket: shuffled(count, *bucket) for bucket, count in self._clips.items()},
      {
        bucket: random_words(count, self._seed, epoch, *bucket, RATE_FOLD)
        for bucket, count in self._clips.items()
      },
      np.repeat(np.arange(len(self._batches)), self._batches)[order],
      np.concatenate([np.arange(count) for count in self._batches])[order],
    )
