"""The clips that are cut from a file: their names, where they lie in it, and their split."""

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from cogvideox_jax.data import buckets
from cogvideox_jax.data.buckets import Bucket
from cogvideox_jax.data.manifest import Item
from cogvideox_jax.data.video import VideoInfo, Window


class Clip(NamedTuple):
  """A window of a file at a frame rate: everything about a clip but its frames."""

  item: Item
  source: str  # Names the clip: the item's id, or `clip_name` where a file gives several clips.
  window: Window
  fps: float

  @property
  def bucket(self) -> Bucket:
    return Bucket(*self.window[1:])


def cut_clips(
  item: Item,
  info: VideoInfo,
  sizes: Sequence[tuple[int, int]],
  durations: Sequence[int],
  fps: float,
) -> list[Clip]:
  """Cuts a measured file into clips, as `buckets.cut` does, and names them.

  Raises VideoError if the file gives no clip.
  """
  windows = buckets.cut(info, sizes, durations, fps)
  names = [item.id] if len(windows) == 1 else [clip_name(item.id, n) for n in range(len(windows))]
  return [Clip(item, name, window, fps) for name, window in zip(names, windows, strict=True)]


def clip_name(file: str, number: int) -> str:
  """The source of the number-th clip of a file that gives several."""
  return f"{file}#{number}"


def source_hash(source: str) -> int:
  """64 uniform bits that follow from the name of a clip's file: equal for all clips of a file.

  A clip is held out for validation if its hash is below the validation fraction of 2**64.
  """
  file = re.sub(rb"#\d+$", b"", source.encode())
  return int.from_bytes(hashlib.blake2b(file, digest_size=8).digest(), "little")
