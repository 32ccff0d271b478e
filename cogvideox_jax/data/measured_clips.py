"""The clips of a manifest or folder: measured once, without keeping a frame."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Bool, Int
from tqdm import tqdm

from cogvideox_jax.data.buckets import Bucket
from cogvideox_jax.data.clips import are_held_out, cut_clips, source_hash
from cogvideox_jax.data.decoding import Decoders, File
from cogvideox_jax.data.items import Item, Refusal
from cogvideox_jax.data.manifest import read_manifest
from cogvideox_jax.data.media import VideoError
from cogvideox_jax.data.video import VideoInfo, Window
from cogvideox_jax.errors import UserError

RATE_SLACK = 0.05  # A file of 15.984 frames a second may be read at 16.


class BucketClips(NamedTuple):
  """The clips of one bucket, in the order of the source."""

  files: Int[np.ndarray, " clips"]  # The number of each clip's file in `MeasuredClips.files`.
  starts: Int[np.ndarray, " clips"]  # The clip's first frame, counted at the frame rate.


class MeasuredClips(NamedTuple):
  """All clips of a source, by bucket."""

  files: Sequence[Item]
  fps: float  # Frames a second that the clips are brought to.
  by_bucket: Mapping[Bucket, BucketClips]  # In ascending order; no bucket is empty.
  refusals: Sequence[Refusal]  # Lines and files that give no clip, and why.
  # The frame rates at which each file's clips may be read: `fps`, and then faster ones. No file has
  # an entry if `fps` is the only one.
  rates: Mapping[int, tuple[float, ...]] = MappingProxyType({})

  @property
  def num_clips(self) -> int:
    return sum(len(bucket.files) for bucket in self.by_bucket.values())

  def split(self, validation_fraction: float) -> tuple["MeasuredClips", "MeasuredClips"]:
    """Returns the clips to train on and those that are held out for validation.

    A file is held out, with all of its clips, by the hash of its name: the same files that an
    encoded dataset holds out.

    Args:
      validation_fraction: in [0, 1); 0 holds nothing out.

    Raises:
      UserError: there is nothing left to train on.
    """
    hashes = np.array([source_hash(item.id) for item in self.files], np.uint64)
    held_out = are_held_out(hashes, validation_fraction)
    train, validation = self._of_files(~held_out), self._of_files(held_out)
    if not train.num_clips:
      raise UserError(
        f"none of the {self.num_clips} clips is in the train split:\n"
        f"change config.data.validation_fraction, which is {validation_fraction}"
      )
    return train, validation

  def digest(self) -> str:
    """Equal digests mean equal clips, so equal batches: hosts of one job must agree on it."""
    total = hashlib.sha256(repr((self.fps, [item.id for item in self.files])).encode())
    for bucket, found in self.by_bucket.items():
      total.update(repr(bucket).encode())
      total.update(np.stack(found).astype("<i8").tobytes())
    if self.rates:
      total.update(repr(sorted(self.rates.items())).encode())
    return total.hexdigest()

  def videos(self) -> "MeasuredClips":
    """Returns the clips of several frames."""
    return self._replace(by_bucket={key: x for key, x in self.by_bucket.items() if key[0] > 1})

  def stills(self) -> "MeasuredClips":
    """Returns the clips of one frame; if there are none, the first frame of each clip."""
    images = {key: x for key, x in self.by_bucket.items() if key.num_frames == 1}
    if images:
      return self._replace(by_bucket=images)
    found: dict[Bucket, list[BucketClips]] = {}
    for bucket, clips in self.by_bucket.items():
      found.setdefault(bucket._replace(num_frames=1), []).append(clips)
    joined = {
      bucket: BucketClips(*map(np.concatenate, zip(*clips, strict=True)))
      for bucket, clips in sorted(found.items())
    }
    return self._replace(by_bucket=joined)

  def _of_files(self, chosen: Bool[np.ndarray, " files"]) -> "MeasuredClips":
    kept = {
      bucket: BucketClips(*(column[chosen[found.files]] for column in found))
      for bucket, found in self.by_bucket.items()
    }
    return self._replace(by_bucket={key: kept[key] for key in kept if len(kept[key].files)})


def measure(
  source: epath.PathLike,
  sizes: Sequence[tuple[int, int]],
  durations: Sequence[int],
  fps: float,
  decoders: Decoders,
  more_fps: Sequence[float] = (),
  *,
  subfolders: bool = True,
  allow_links: bool = False,
) -> MeasuredClips:
  """Measures every file of a manifest or folder and cuts it into clips, as `encode` does.

  Prints a line for each file that gives no clip, and what was passed over.

  Args:
    sizes: (height, width) in pixels; a file takes the nearest.
    durations: pixel frames, each 4k+1; a clip has as many as the rest of its file allows.
    fps: frames a second that clips are brought to.
    more_fps: faster rates, at which a clip may be read, too; a file has those up to its own rate.
    subfolders: whether folders inside a folder of clips are searched.
    allow_links: whether links may lead out of the manifest's folder.

  Raises:
    UserError: the source does not exist, is empty, or gives no clip.
  """
  items, refusals, notes = read_manifest(source, subfolders=subfolders, allow_links=allow_links)
  for note in notes:
    tqdm.write(note)
  windows: dict[int, list[Window]] = {}
  faults: dict[int, str] = {}
  rates: dict[int, tuple[float, ...]] = {}

  def plan(number: int, info: VideoInfo) -> list[Window]:
    if info.note:
      tqdm.write(f"{items[number].file}: {info.note}")
    try:
      cut = cut_clips(items[number], info, sizes, durations, fps)
      windows[number] = [clip.window for clip in cut]
      if more_fps:
        rates[number] = (fps, *(rate for rate in more_fps if rate <= info.fps + RATE_SLACK))
    except VideoError as error:
      faults[number] = str(error)
    return []  # No frame is read yet.

  files = (File(item.file, fps, partial(plan, number)) for number, item in enumerate(items))
  measured = tqdm(decoders.decode(files), "Measuring clips", len(items), unit="file")
  for number, pieces in enumerate(measured):
    try:
      next(pieces, None)
    except VideoError as error:
      faults[number] = str(error)
    if number in faults:
      tqdm.write(f"{items[number].file}: {faults[number]}")
  if not windows:
    raise UserError(
      f"No clip of {source} can be used: {len(items)} named, {len(refusals)} refused.\n"
      f"The shortest duration is {min(durations)} frames at {fps} frames a second."
    )
  refused = [Refusal(items[n].name, items[n].line, fault) for n, fault in sorted(faults.items())]
  return MeasuredClips(items, fps, _by_bucket(windows), [*refusals, *refused], rates)


def _by_bucket(windows: Mapping[int, Sequence[Window]]) -> dict[Bucket, BucketClips]:
  """windows: those of each file, by the file's number."""
  found: dict[Bucket, list[tuple[int, int]]] = {}
  for number in sorted(windows):
    for window in windows[number]:
      found.setdefault(Bucket(*window[1:]), []).append((number, window.start))
  columns = {bucket: np.array(found[bucket], np.int32).T for bucket in sorted(found)}
  return {bucket: BucketClips(files, starts) for bucket, (files, starts) in columns.items()}
