"""Decodes the clips that models are scored on, in batches."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from cogvideox_jax.data.buckets import Bucket
from cogvideox_jax.data.decoding import Decoders, File
from cogvideox_jax.data.measured_clips import MeasuredClips
from cogvideox_jax.data.media import VideoError
from cogvideox_jax.data.video import Window

BATCH_CLIPS = 4


def decode(
  clips: MeasuredClips, bucket: Bucket, decoders: Decoders, *, every_window: bool
) -> Iterator[UInt8[np.ndarray, "b F H W 3"]]:
  """Yields the clips of a bucket, up to BATCH_CLIPS at a time, file by file.

  A file that cannot be decoded is left out, with a line that says so.

  Args:
    every_window: whether all clips of a file are wanted, or only its first one.
  """
  starts: dict[int, list[int]] = {}
  found = clips.by_bucket.get(bucket)
  for file, start in zip(found.files.tolist(), found.starts.tolist(), strict=True) if found else ():
    starts.setdefault(file, []).append(start)
  if not every_window:
    starts = {file: held[:1] for file, held in starts.items()}
  size = bucket.height, bucket.width
  files = [
    File(clips.files[file].file, clips.fps, [Window(at, bucket.num_frames, *size) for at in held])
    for file, held in starts.items()
  ]
  waiting = []
  decoded = tqdm(decoders.decode(files), "Scoring clips", len(files), unit="file")
  for file, pieces in zip(files, decoded, strict=True):
    try:
      for piece in pieces:
        waiting.append(piece.frames)
        if len(waiting) == BATCH_CLIPS:
          yield np.stack(waiting)
          waiting = []
    except VideoError as error:
      tqdm.write(f"{file.path}: {error}; it is left out")
  if waiting:
    yield np.stack(waiting)
