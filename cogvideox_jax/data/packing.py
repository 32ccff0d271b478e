"""Packs clips of any duration, size and aspect ratio into rows of a fixed number of tokens.

The paper calls this frame pack. Which *lengths* share a row is planned once for a dataset
(`Layout`), and depends only on how many clips there are of each length. A layout has a slot for
each clip. An epoch (`Epoch`) draws which clips fill the slots of their length, and shuffles the
rows and the clips in each row. So an epoch holds every clip once, all epochs have the same number
of rows, and any row of any epoch is found without planning earlier epochs. Planning reads the
index, never the records.
"""

import bisect
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from einops import rearrange
from etils import epath
from jaxtyping import Bool, Int, Shaped, UInt64

from cogvideox_jax.data.dataset_index import NPZ_FAULTS
from cogvideox_jax.data.files import write_arrays
from cogvideox_jax.types import TEXT, VISION, Batch, Example

_ORDER, _SLOTS, _ROWS, _WITHIN, _DROPS, _CAPTIONS = range(6)  # What random words are drawn for.


class Layout(NamedTuple):
  """The rows of every epoch, as slots that clips of the right length fill."""

  lengths: Int[np.ndarray, " slots"]  # Tokens of the clip that fills each slot, row after row.
  rows: Int[np.ndarray, " slots"]  # Each slot's row.

  @property
  def num_rows(self) -> int:
    return int(self.rows[-1]) + 1


class Epoch(NamedTuple):
  """The clips of each row of an epoch."""

  clips: Int[np.ndarray, " slots"]  # Row after row; every clip once.
  starts: Int[np.ndarray, " rows_and_end"]  # Row r is clips[starts[r] : starts[r + 1]].


def random_words(count: int, *key: int) -> UInt64[np.ndarray, " count"]:
  """Draws random 64-bit words that depend only on the key: NumPy never changes these streams."""
  entropy = [number % 2**64 for number in key]
  return np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)


def dropped(rate: float, clips: int, seed: int, epoch: int) -> Bool[np.ndarray, " clips"]:
  """Draws which clips lose their caption in an epoch, each with probability `rate`."""
  return random_words(clips, seed, epoch, _DROPS) < rate * 2.0**64


def captions(counts: Int[np.ndarray, " clips"], seed: int, epoch: int) -> Int[np.ndarray, " clips"]:
  """Draws which of its captions each clip has in an epoch.

  Args:
    counts: the number of captions of each clip, at least 1.
  """
  words = random_words(len(counts), seed, epoch, _CAPTIONS)
  return (words % counts.astype(np.uint64)).astype(np.int64)


def clip_tokens(
  latents: Int[np.ndarray, "clips 3"],
  *,
  patch: Sequence[int],
  text_length: int,
) -> Int[np.ndarray, " clips"]:
  """Counts the tokens, text and vision, of clips of (f, h, w) latents.

  The patch must divide h and w; f is rounded up to a multiple, as `pack` does.
  """
  return text_length + np.prod(-(-latents // np.array(patch)), axis=1, dtype=np.int64)


def plan_layout(lengths: Int[np.ndarray, " clips"], row_tokens: int, max_clips: int) -> Layout:
  """Packs clips of these lengths, none above row_tokens, into rows of at most max_clips.

  Best fit: each clip goes into the fullest row that has room for it. The clips come in random
  order, so that rows mix lengths. Longest first would end with rows of images only, which max_clips
  leaves half empty. The time is linear in the clips: about a second for a million.
  """
  order = np.argsort(random_words(len(lengths), _ORDER), kind="stable")
  lengths = np.sort(lengths)[order]
  room: list[int] = []  # Tokens left in each row.
  count: list[int] = []  # Clips in each row.
  sizes: list[int] = []  # The distinct numbers of tokens left in open rows, ascending,
  open_rows: dict[int, list[int]] = {}  # and the rows that have so many left.
  rows = np.empty(len(lengths), np.int32)
  for slot, length in enumerate(lengths.tolist()):
    best = bisect.bisect_left(sizes, length)
    if best == len(sizes):
      row = len(room)
      room.append(row_tokens)
      count.append(0)
    else:
      row = open_rows[sizes[best]].pop()
      if not open_rows[sizes[best]]:
        del open_rows[sizes.pop(best)]
    room[row] -= length
    count[row] += 1
    rows[slot] = row
    if room[row] and count[row] < max_clips:
      if room[row] not in open_rows:
        bisect.insort(sizes, room[row])
      open_rows.setdefault(room[row], []).append(row)
  by_row = np.argsort(rows, kind="stable")
  return Layout(lengths[by_row].astype(np.int32), rows[by_row])


def cached_layout(
  lengths: Int[np.ndarray, " clips"], row_tokens: int, max_clips: int, folder: epath.Path
) -> Layout:
  """Returns `plan_layout`, cached in a file of `folder` named by all that the layout depends on."""
  ordered = np.sort(lengths).astype("<i8")
  key = hashlib.sha256(ordered.tobytes() + f"{row_tokens} {max_clips} best-fit".encode())
  path = folder / f"{key.hexdigest()[:32]}.npz"
  try:
    with path.open("rb") as file, np.load(file) as arrays:
      return Layout(arrays["lengths"], arrays["rows"])
  except NPZ_FAULTS:
    pass  # Absent or damaged: plan it again.
  layout = plan_layout(lengths, row_tokens, max_clips)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    write_arrays(path, layout._asdict())
  except OSError:
    pass  # If the dataset is read-only, it is planned at every start.
  return layout


def plan_epoch(layout: Layout, lengths: Int[np.ndarray, " clips"], seed: int, epoch: int) -> Epoch:
  """Draws an epoch: the clips for the slots of each length, the order of rows, and that in rows.

  The order within a row is drawn too, because it decides which interval a clip's timestep is drawn
  from.

  Args:
    lengths: tokens of each clip, in the order of the clips; the layout was planned for them.
  """
  drawn = np.argsort(random_words(len(lengths), seed, epoch, _SLOTS), kind="stable")
  clips = np.empty(len(lengths), np.int64)
  clips[np.argsort(layout.lengths, kind="stable")] = drawn[
    np.argsort(lengths[drawn], kind="stable")
  ]
  within = random_words(len(lengths), seed, epoch, _WITHIN)
  shuffled = clips[_shuffled_within(layout, within)]
  order = np.argsort(random_words(layout.num_rows, seed, epoch, _ROWS), kind="stable")
  counts = np.bincount(layout.rows)
  ends = np.cumsum(counts[order])
  moves = np.cumsum(counts)[order] - ends  # A row's slots before shuffling, minus those after.
  slots = np.arange(len(lengths)) + np.repeat(moves, counts[order])
  return Epoch(shuffled[slots], np.concatenate([[0], ends]))


def _shuffled_within(
  layout: Layout, words: UInt64[np.ndarray, " slots"]
) -> Int[np.ndarray, " slots"]:
  """Returns the slots, row after row, in each row in the order of random words.

  Row and word are joined to one key, which is nearly sorted: sorting it is ten times faster than
  sorting by two keys.
  """
  bits = np.uint64(layout.num_rows.bit_length())
  keys = layout.rows.astype(np.uint64) << (np.uint64(64) - bits) | words >> bits
  return np.argsort(keys, kind="stable")


def pack(
  examples: Sequence[Example], *, patch: tuple[int, int, int], row_tokens: int, max_clips: int
) -> Batch:
  """Packs examples, one after another, into one row: a `Batch` with b = 1. They must fit.

  Latents and text states keep the types that they are stored in, because that halves the bytes to
  hold and to send. The first latent frame of a clip is repeated in front until the patch divides
  the number of frames (CogVideoX 1.5: 21 latent frames become 22). All examples have an image or
  none has, with one draw.
  """
  text_length = len(examples[0].text)
  row = _empty_row(examples[0], patch, row_tokens, max_clips)
  start = 0
  for segment, example in enumerate(examples, start=1):
    extra = -len(example.mean) % patch[0]
    mean, logvar = (_repeat_first(x, extra) for x in (example.mean, example.logvar))
    grid = [size // step for size, step in zip(mean.shape[:3], patch, strict=True)]
    middle = start + text_length
    end = middle + math.prod(grid)
    row.text[0, segment - 1] = example.text
    row.mean[0, middle:end] = patchify(mean, patch)
    row.logvar[0, middle:end] = patchify(logvar, patch)
    row.segment_ids[0, start:end] = segment
    row.experts[0, start:middle] = TEXT
    row.coordinates[0, start:middle, 0] = np.arange(text_length)
    row.coordinates[0, middle:end] = np.indices(grid).reshape(3, -1).T
    row.grids[0, segment] = grid
    if row.extra is not None:
      row.extra[0, segment] = extra
    if row.image is not None and example.image is not None:
      moments = patchify(example.image[0], (1, *patch[1:]))
      row.image[0, middle : middle + math.prod(grid[1:])] = rearrange(
        moments, "(two n) q -> n two q", two=2
      )
    start = end
  return row


def stack(rows: Sequence[Batch]) -> Batch:
  """Joins batches of the same shapes along their rows."""
  fields = zip(*rows, strict=True)
  return Batch._make(None if field[0] is None else np.concatenate(field) for field in fields)


def patchify(
  latents: Shaped[np.ndarray, "f h w c"], patch: tuple[int, int, int]
) -> Shaped[np.ndarray, "n p"]:
  """Cuts latents into patches in the order (t, h, w); inside a patch the channel is slowest."""
  t, h, w = patch
  return rearrange(latents, "(f t) (h y) (w x) c -> (f h w) (c t y x)", t=t, y=h, x=w)


def _repeat_first(
  latents: Shaped[np.ndarray, "f h w c"], times: int
) -> Shaped[np.ndarray, "f2 h w c"]:
  return np.concatenate([latents[:1].repeat(times, axis=0), latents]) if times else latents


def _empty_row(
  example: Example, patch: tuple[int, int, int], row_tokens: int, max_clips: int
) -> Batch:
  dtype, frame_width = example.mean.dtype, example.mean.shape[-1] * math.prod(patch[1:])
  return Batch(
    mean=np.zeros((1, row_tokens, patch[0] * frame_width), dtype),
    logvar=np.zeros((1, row_tokens, patch[0] * frame_width), dtype),
    text=np.zeros((1, max_clips, *example.text.shape), example.text.dtype),
    segment_ids=np.zeros((1, row_tokens), np.int32),
    experts=np.full((1, row_tokens), VISION, np.int32),
    coordinates=np.zeros((1, row_tokens, 3), np.int32),
    grids=np.ones((1, max_clips + 1, 3), np.int32),
    extra=np.zeros((1, max_clips + 1), np.int32) if patch[0] > 1 else None,
    image=None if example.image is None else np.zeros((1, row_tokens, 2, frame_width), dtype),
  )
