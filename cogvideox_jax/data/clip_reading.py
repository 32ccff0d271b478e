"""Decodes the clips of batches, some batches ahead of the one that is taken."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Int, UInt8, UInt64

from cogvideox_jax.data.buckets import Bucket
from cogvideox_jax.data.decoding import Decoders, File, Piece
from cogvideox_jax.data.measured_clips import MeasuredClips
from cogvideox_jax.data.media import VideoError
from cogvideox_jax.data.video import Window
from cogvideox_jax.errors import UserError

READ_AHEAD_BYTES = 2**29  # Decoding ahead stops at so many bytes of frames, or
READ_AHEAD_BATCHES = 32  # at so many batches; one batch is always ahead.


class Choice(NamedTuple):
  """From which clips of a bucket a batch is filled."""

  bucket: Bucket
  permutation: Int[np.ndarray, " clips"]
  words: UInt64[np.ndarray, " clips"]  # Bits that choose each clip's frame rate.
  avoided: frozenset[str] = frozenset()  # Names of files whose clips give their place to others.


class FileAt(NamedTuple):
  """A file, by its number, and the frame rate at which clips of it are read."""

  file: int
  fps: float


def read_ahead(
  start: Callable[[int], "Reading"], first: int
) -> Generator[UInt8[np.ndarray, "b F H W 3"], None, None]:
  """Yields batch `first` and those after it, with some more started ahead."""
  ahead: deque[Reading] = deque()
  size, k = 0, first
  try:
    while True:
      while not ahead or (size < READ_AHEAD_BYTES and len(ahead) < READ_AHEAD_BATCHES):
        ahead.append(start(k))
        size += ahead[-1].frames.nbytes
        k += 1
      frames = ahead[0].result()
      size -= ahead.popleft().frames.nbytes
      yield frames
  finally:
    for reading in ahead:
      reading.cancel()


class Source:
  """Decodes clips by their numbers, and remembers which of them cannot be decoded."""

  def __init__(self, clips: MeasuredClips, decoders: Decoders):
    self._clips, self._decoders = clips, decoders
    self._failed: set[tuple[Bucket, int]] = set()
    self._reported: set[int] = set()  # Numbers of files.

  def usable(self, choice: Choice, start: int) -> int:
    """Returns clip `start` of a permutation, or the next one that can and may be used."""
    bucket, permutation = choice.bucket, choice.permutation
    for index in range(start, start + len(permutation)):
      clip = int(permutation[index % len(permutation)])
      if (bucket, clip) not in self._failed and not self._is_avoided(choice, clip):
        return clip
    raise UserError(
      f"none of the {len(permutation)} clips of {bucket.num_frames} frames at "
      f"{bucket.height}x{bucket.width} can be decoded any more, or all are avoided.\n"
      "The log says why; once the files are back, the same command goes on."
    )

  def _is_avoided(self, choice: Choice, clip: int) -> bool:
    return bool(choice.avoided) and self.names(choice.bucket, [clip])[0] in choice.avoided

  def by_file(self, choice: Choice, clips: Iterable[int]) -> dict[FileAt, list[int]]:
    """Returns the clips that are read together: those of one file at one frame rate."""
    files: dict[FileAt, list[int]] = {}
    for clip in clips:
      file = int(self._clips.by_bucket[choice.bucket].files[clip])
      rates = self._clips.rates.get(file, (self._clips.fps,))
      rate = rates[int(choice.words[clip] % np.uint64(len(rates)))]
      files.setdefault(FileAt(file, rate), []).append(clip)
    return files

  def names(self, bucket: Bucket, clips: Iterable[int]) -> list[str]:
    """Returns the names of the files that hold clips of a bucket."""
    files = self._clips.by_bucket[bucket].files
    return [self._clips.files[files[clip]].id for clip in clips]

  def read(
    self, source: FileAt, bucket: Bucket, clips: Sequence[int], take: Callable[[Piece], None]
  ) -> Future[None]:
    """Decodes clips of one file, as `Decoders.read`; pieces are numbered as `clips` are.

    At a faster rate a clip begins at the same instant, and is shorter.
    """
    starts, faster = self._clips.by_bucket[bucket].starts, source.fps / self._clips.fps
    windows = [Window(round(int(starts[clip]) * faster), *bucket) for clip in clips]
    file = self._clips.files[source.file].file
    return self._decoders.read(File(file, source.fps, windows), take)

  def give_up(self, file: int, bucket: Bucket, clips: Iterable[int], error: VideoError) -> None:
    """Remembers that clips of a file cannot be decoded; says so once for the file."""
    self._failed.update((bucket, clip) for clip in clips)
    if file not in self._reported:
      self._reported.add(file)
      logging.warning(
        "%s: %s; other clips take the place of its own", self._clips.files[file].file, error
      )


class Reading:
  """A batch that is being decoded. Each file is decoded once for all clips wanted of it."""

  def __init__(
    self,
    source: Source,
    choice: Choice,
    first: Int[np.ndarray, " b"],
  ):
    """first: the index of each row's clip in the permutation; if it fails, the next is taken."""
    self.frames = np.empty((len(first), *choice.bucket, 3), np.uint8)
    self._source, self._choice, self._bucket = source, choice, choice.bucket
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
          self._source.give_up(file.file, self._bucket, failed, error)
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
      clip = self._source.usable(self._choice, first)
      self._rows.setdefault(clip, []).append(row)
    self._clips = self._source.by_file(self._choice, self._rows)
    self._running = {
      file: self._source.read(file, self._bucket, clips, partial(self._take, clips))
      for file, clips in self._clips.items()
    }

  def _take(self, clips: Sequence[int], piece: Piece) -> None:
    """Copies a clip's frames into its rows. Runs in a decoding thread."""
    for row in self._rows[clips[piece.number]]:
      self.frames[row] = piece.frames
      del self._lacking[row]
