"""Frame packing: clips of any duration, resolution and aspect in rows of a fixed number of tokens.

Which *lengths* share a row is planned once for a dataset (`Layout`): it depends on nothing else
than how many clips there are of each length. An epoch (`Epoch`) only draws which clips of a
length take the places of that length, and shuffles rows and the clips in a row. So each epoch
holds every clip once, all epochs have the same number of rows, and any row of any epoch is found
without planning the epochs before it. Planning reads the index, never the records.
"""

import bisect
import hashlib
import math
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from einops import rearrange
from etils import epath
from jaxtyping import Bool, Int, Shaped, UInt64

from cogvideox_jax.data.files import write_arrays
from cogvideox_jax.types import TEXT, VISION, Batch, Example

_ORDER, _PLACES, _ROWS, _WITHIN, _DROPS, _CAPTIONS = range(6)  # What random words are drawn for.


class Layout(NamedTuple):
  """The rows of every epoch, before clips take their places."""

  lengths: Int[np.ndarray, " places"]  # Tokens of the clip at each place, row after row.
  rows: Int[np.ndarray, " places"]  # Which row the place is in.

  @property
  def num_rows(self) -> int:
    return int(self.rows[-1]) + 1


class Epoch(NamedTuple):
  """Which clips stand in each row of an epoch."""

  clips: Int[np.ndarray, " places"]  # Row after row; every clip once.
  starts: Int[np.ndarray, " rows_and_end"]  # Row r is clips[starts[r] : starts[r + 1]].


def random_words(count: int, *key: int) -> UInt64[np.ndarray, " count"]:
  """Random 64-bit words, a function of the key alone: NumPy keeps these streams for ever."""
  entropy = [part % 2**64 for part in key]
  return np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)


def dropped(rate: float, clips: int, seed: int, epoch: int) -> Bool[np.ndarray, " clips"]:
  """Which clips lose their caption in an epoch, each with probability `rate`."""
  return random_words(clips, seed, epoch, _DROPS) < rate * 2.0**64


def captions(counts: Int[np.ndarray, " clips"], seed: int, epoch: int) -> Int[np.ndarray, " clips"]:
  """Which of its captions each clip has in an epoch; counts: how many it has, at least 1."""
  words = random_words(len(counts), seed, epoch, _CAPTIONS)
  return (words % counts.astype(np.uint64)).astype(np.int64)


def clip_tokens(
  latents: Int[np.ndarray, "clips 3"],
  *,
  patch: Sequence[int],
  text_length: int,
) -> Int[np.ndarray, " clips"]:
  """Tokens, text and vision, of clips of (f, h, w) latents.

  The patch divides h and w; f is filled up, as `pack` does.
  """
  return text_length + np.prod(-(-latents // np.array(patch)), axis=1, dtype=np.int64)


def plan_layout(lengths: Int[np.ndarray, " clips"], row_tokens: int, max_clips: int) -> Layout:
  """Packs clips of these lengths, none above row_tokens, in rows of at most max_clips.

  Best fit: each clip joins the fullest row that has room for it. The clips come in random order,
  so that rows mix lengths; longest first would end in rows of images alone, which max_clips
  leaves half empty. Linear in the clips, about a second for a million.
  """
  order = np.argsort(random_words(len(lengths), _ORDER), kind="stable")
  lengths = np.sort(lengths)[order]
  room: list[int] = []  # Tokens left in each row.
  count: list[int] = []  # Clips in each row.
  sizes: list[int] = []  # Distinct rooms of the open rows, ascending,
  open_rows: dict[int, list[int]] = {}  # and the rows that have them.
  rows = np.empty(len(lengths), np.int32)
  for place, length in enumerate(lengths.tolist()):
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
    rows[place] = row
    if room[row] and count[row] < max_clips:
      if room[row] not in open_rows:
        bisect.insort(sizes, room[row])
      open_rows.setdefault(room[row], []).append(row)
  by_row = np.argsort(rows, kind="stable")
  return Layout(lengths[by_row].astype(np.int32), rows[by_row])


def cached_layout(
  lengths: Int[np.ndarray, " clips"], row_tokens: int, max_clips: int, folder: epath.Path
) -> Layout:
  """`plan_layout`, kept in a file of `folder` that is named after all the layout depends on."""
  ordered = np.sort(lengths).astype("<i8")
  key = hashlib.sha256(ordered.tobytes() + f"{row_tokens} {max_clips} best-fit".encode())
  path = folder / f"{key.hexdigest()[:32]}.npz"
  try:
    with path.open("rb") as file, np.load(file) as arrays:
      return Layout(arrays["lengths"], arrays["rows"])
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    pass  # Absent or damaged: the plan can always be made again.
  layout = plan_layout(lengths, row_tokens, max_clips)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    write_arrays(path, layout._asdict())
  except OSError:
    pass  # A dataset that may only be read is planned at every start.
  return layout


def plan_epoch(layout: Layout, lengths: Int[np.ndarray, " clips"], seed: int, epoch: int) -> Epoch:
  """Draws an epoch: clips for the places of their length, and an order of rows and within them.

  lengths: as the layout was planned for, in the order of the clips.
  The order within a row is drawn too: it decides the clip's stratum of timesteps.
  """
  drawn = np.argsort(random_words(len(lengths), seed, epoch, _PLACES), kind="stable")
  clips = np.empty(len(lengths), np.int64)
  clips[np.argsort(layout.lengths, kind="stable")] = drawn[
    np.argsort(lengths[drawn], kind="stable")
  ]
  within = random_words(len(lengths), seed, epoch, _WITHIN)
  shuffled = clips[_shuffled_within(layout, within)]
  order = np.argsort(random_words(layout.num_rows, seed, epoch, _ROWS), kind="stable")
  counts = np.bincount(layout.rows)
  ends = np.cumsum(counts[order])
  moves = np.cumsum(counts)[order] - ends  # From where a row will stand to where it stands.
  places = np.arange(len(lengths)) + np.repeat(moves, counts[order])
  return Epoch(shuffled[places], np.concatenate([[0], ends]))


def _shuffled_within(
  layout: Layout, words: UInt64[np.ndarray, " places"]
) -> Int[np.ndarray, " places"]:
  """The places, row after row, of a row in the order of random words.

  Row and word make one key, which is nearly sorted: ten times quicker to sort than two keys.
  """
  bits = np.uint64(layout.num_rows.bit_length())
  keys = layout.rows.astype(np.uint64) << (np.uint64(64) - bits) | words >> bits
  return np.argsort(keys, kind="stable")


def pack(
  examples: Sequence[Example], *, patch: tuple[int, int, int], row_tokens: int, max_clips: int
) -> Batch:
  """One row, a `Batch` with b = 1, of the examples in turn; they must fit.

  Latents and text states keep the types they are stored in: half the bytes to hold and to send.
  The first latent frame of a clip is repeated in front until the patch divides their number
  (CogVideoX 1.5: 21 latent frames become 22). Examples have an image all or none, and one draw.
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
  """Batches of the same shapes, one below the other."""
  parts = zip(*rows, strict=True)
  return Batch._make(None if part[0] is None else np.concatenate(part) for part in parts)


def patchify(
  latents: Shaped[np.ndarray, "f h w c"], patch: tuple[int, int, int]
) -> Shaped[np.ndarray, "n p"]:
  """Patches in the order (t, h, w); inside one the channel is slowest."""
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
