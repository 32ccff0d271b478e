"""The clips that are cut from a file: their windows, their names and the split they belong to."""

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt64

from cogvideox_jax.data import buckets
from cogvideox_jax.data.buckets import Bucket
from cogvideox_jax.data.colours import SDR
from cogvideox_jax.data.items import Item
from cogvideox_jax.data.video import VideoInfo, Window


class Clip(NamedTuple):
  """Everything about a clip except its frames."""

  item: Item
  source: str  # The clip's name: the item's id, or a `clip_name` if the file gives several clips.
  window: Window
  fps: float
  transfer: str = SDR  # That of the file; see colours.py.

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
  """Cuts a measured file into clips (see `buckets.cut`) and names them.

  Raises VideoError if the file gives no clip.
  """
  windows = buckets.cut(info, sizes, durations, fps)
  names = [item.id] if len(windows) == 1 else [clip_name(item.id, n) for n in range(len(windows))]
  return [
    Clip(item, name, window, fps, info.transfer)
    for name, window in zip(names, windows, strict=True)
  ]


def clip_name(file: str, number: int) -> str:
  """Returns the name of the number-th clip of a file that gives several."""
  return f"{file}#{number}"


def source_hash(source: str) -> int:
  """Returns 64 uniform bits that depend only on the name of the clip's file.

  `are_held_out` chooses by them. All clips of a file have the same bits, so they are in the same
  split.
  """
  file = re.sub(rb"#\d+$", b"", source.encode())
  return int.from_bytes(hashlib.blake2b(file, digest_size=8).digest(), "little")


def are_held_out(
  hashes: UInt64[np.ndarray, " clips"], validation_fraction: float
) -> Bool[np.ndarray, " clips"]:
  """Returns which clips are held out for validation: those whose bits are below the fraction.

  If there are so few files that chance would hold out all of them, none is held out, because
  training needs them.

  Args:
    hashes: the `source_hash` of each clip.
    validation_fraction: in [0, 1]. Above a half it may hold out everything.
  """
  held_out = hashes < validation_fraction * 2.0**64
  by_chance = held_out.all() and validation_fraction <= 0.5
  return np.zeros_like(held_out) if by_chance else held_out
