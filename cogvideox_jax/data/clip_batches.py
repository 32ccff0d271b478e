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
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Int, UInt8

from cogvideox_jax.data.buckets import Bucket
from cogvideox_jax.data.decoding import Decoders, File, Piece
from cogvideox_jax.data.measured_clips import MeasuredClips
from cogvideox_jax.data.media import VideoError
from cogvideox_jax.data.packing import random_words
from cogvideox_jax.data.video import Window
from cogvideox_jax.errors import UserError

READ_AHEAD_BYTES = 2**29  # Decoding ahead stops at so many bytes of frames, or
READ_AHEAD_BATCHES = 32  # at so many batches; one batch is always ahead.

RowsOf = Callable[[int], Sequence[int]]  # Clips of a batch -> the numbers of a host's rows in it.


class BatchSize(NamedTuple):
  """The shape of a batch."""

  bucket: Bucket
  clips: int  # Rows of the global batch.


class _Epoch(NamedTuple):
  """The batches of one epoch, in their order."""

  permutations: Mapping[Bucket, Int[np.ndarray, " clips"]]  # The clips of each bucket.
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
    self._seed, self._source = seed, _Source(clips, decoders)
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
    return self._start(k, rows).result()

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
    ahead: deque[_Reading] = deque()
    size, k = 0, start
    try:
      while True:
        while not ahead or (size < READ_AHEAD_BYTES and len(ahead) < READ_AHEAD_BATCHES):
          ahead.append(self._start(k, rows))
          size += ahead[-1].frames.nbytes
          k += 1
        frames = ahead[0].result()
        size -= ahead.popleft().frames.nbytes
        yield frames
    finally:
      for reading in ahead:
        reading.cancel()

  def _start(self, k: int, rows: RowsOf | None) -> "_Reading":
    plan, slot, size = self._epoch_plan(self.epoch(k)), k % self.per_epoch, self.sizes_of(k)
    mine = np.arange(size.clips) if rows is None else np.asarray(rows(size.clips))
    permutation = plan.permutations[size.bucket]
    first = (plan.numbers[slot] * size.clips + mine) % len(permutation)
    return _Reading(self._source, size.bucket, permutation, first)

  def _epoch_plan(self, epoch: int) -> _Epoch:
    with self._lock:  # Otherwise all threads that reach a new epoch would plan it.
      return self._plan(epoch)

  def _plan_epoch(self, epoch: int) -> _Epoch:
    def shuffled(count: int, *key: int) -> Int[np.ndarray, " count"]:
      return np.argsort(random_words(count, self._seed, epoch, *key), kind="stable")

    order = shuffled(self.per_epoch)
    return _Epoch(
      {bucket: shuffled(count, *bucket) for bucket, count in self._clips.items()},
      np.repeat(np.arange(len(self._batches)), self._batches)[order],
      np.concatenate([np.arange(count) for count in self._batches])[order],
    )


class _Source:
  """Decodes clips by their numbers, and remembers which of them cannot be decoded."""

  def __init__(self, clips: MeasuredClips, decoders: Decoders):
    self._clips, self._decoders = clips, decoders
    self._failed: set[tuple[Bucket, int]] = set()
    self._reported: set[int] = set()  # Numbers of files.

  def usable(self, bucket: Bucket, permutation: Int[np.ndarray, " clips"], start: int) -> int:
    """Returns clip `start` of a permutation, or the next one that has not failed."""
    for index in range(start, start + len(permutation)):
      clip = int(permutation[index % len(permutation)])
      if (bucket, clip) not in self._failed:
        return clip
    raise UserError(
      f"none of the {len(permutation)} clips of {bucket.num_frames} frames at "
      f"{bucket.height}x{bucket.width} can be decoded any more.\n"
      "The log says why; once the files are back, the same command goes on."
    )

  def by_file(self, bucket: Bucket, clips: Iterable[int]) -> dict[int, list[int]]:
    """The clips of each file, by the file's number."""
    files: dict[int, list[int]] = {}
    for clip in clips:
      files.setdefault(int(self._clips.by_bucket[bucket].files[clip]), []).append(clip)
    return files

  def names(self, bucket: Bucket, clips: Iterable[int]) -> list[str]:
    """Returns the names of the files that hold clips of a bucket."""
    files = self._clips.by_bucket[bucket].files
    return [self._clips.files[files[clip]].id for clip in clips]

  def read(
    self, file: int, bucket: Bucket, clips: Sequence[int], take: Callable[[Piece], None]
  ) -> Future[None]:
    """Decodes clips of one file, as `Decoders.read`; pieces are numbered as `clips` are."""
    starts = self._clips.by_bucket[bucket].starts
    windows = [Window(int(starts[clip]), *bucket) for clip in clips]
    return self._decoders.read(File(self._clips.files[file].file, self._clips.fps, windows), take)

  def give_up(self, file: int, bucket: Bucket, clips: Iterable[int], error: VideoError) -> None:
    """Remembers that clips of a file cannot be decoded; says so once for the file."""
    self._failed.update((bucket, clip) for clip in clips)
    if file not in self._reported:
      self._reported.add(file)
      logging.warning(
        "%s: %s; other clips take the place of its own", self._clips.files[file].file, error
      )


class _Reading:
  """A batch that is being decoded. Each file is decoded once for all clips wanted of it."""

  def __init__(
    self,
    source: _Source,
    bucket: Bucket,
    permutation: Int[np.ndarray, " clips"],
    first: Int[np.ndarray, " b"],
  ):
    """first: the index of each row's clip in the permutation; if it fails, the next is taken."""
    self.frames = np.empty((len(first), *bucket, 3), np.uint8)
    self._source, self._bucket, self._permutation = source, bucket, permutation
    self._lacking = dict(enumerate(first.tolist()))  # Rows without frames, and their `first`.
    self._start()

  def result(self) -> UInt8[np.ndarray, "b F H W 3"]:
    """Waits for the frames. Raises UserError if no clip of the bucket can be decoded."""
    while self._lacking:
      for file, future in self._running.items():
        try:
          future.result()
        except VideoError as error:
          failed = [clip for clip in self._clips[file] if self._rows[clip][0] in self._lacking]
          self._source.give_up(file, self._bucket, failed, error)
      if self._lacking:
        self._start()
    return self.frames

  def cancel(self) -> None:
    for future in self._running.values():
      future.cancel()

  def _start(self) -> None:
    """Starts to decode the clips of the rows that lack frames."""
    # The rows of each clip: several if the batch is larger than its bucket.
    self._rows: dict[int, list[int]] = {}
    for row, first in self._lacking.items():
      clip = self._source.usable(self._bucket, self._permutation, first)
      self._rows.setdefault(clip, []).append(row)
    self._clips = self._source.by_file(self._bucket, self._rows)
    self._running = {
      file: self._source.read(file, self._bucket, clips, partial(self._take, clips))
      for file, clips in self._clips.items()
    }

  def _take(self, clips: Sequence[int], piece: Piece) -> None:
    """Copies a clip's frames into its rows. Runs in a decoding thread."""
    for row in self._rows[clips[piece.number]]:
      self.frames[row] = piece.frames
      del self._lacking[row]
