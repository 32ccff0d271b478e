"""Summarizes what an encoded dataset holds and how it packs, in numbers and as text."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.rows import Rows

BAR = 30  # Characters of the longest bar of a histogram.


class Contents(NamedTuple):
  """What a dataset holds; its index says it all."""

  clips: int
  images: int  # Clips of one frame.
  hours: float  # The length of all other clips.
  resolutions: dict[str, int]  # HEIGHTxWIDTH in pixels -> clips, by area.
  durations: dict[str, int]  # Frames -> clips.


class Packed(NamedTuple):
  """How the training split packs into rows. Tokens are text and vision together."""

  row_tokens: int
  max_clips: int
  clips: int
  unpackable: int  # Clips longer than a row.
  tokens: int  # Tokens of all clips.
  rows: int  # Rows of an epoch.
  clips_per_row: float
  padding_fraction: float


def contents(dataset: Dataset) -> Contents:
  """Summarizes a dataset. Reads no record."""
  index = dataset.index
  images = index.num_frames == 1
  sizes, counts = np.unique(
    np.column_stack([index.height, index.width]), axis=0, return_counts=True
  )
  by_area = np.argsort(sizes.prod(axis=1), kind="stable")
  return Contents(
    clips=len(dataset),
    images=int(images.sum()),
    hours=float((index.num_frames / index.fps)[~images].sum() / 3600),
    resolutions={
      f"{height}x{width}": int(count)
      for (height, width), count in zip(sizes[by_area], counts[by_area], strict=True)
    },
    durations={str(frames): n for frames, n in sorted(Counter(index.num_frames.tolist()).items())},
  )


def packed(rows: Rows) -> Packed:
  """Summarizes an epoch of rows."""
  clips = len(rows.clips)
  tokens = int(rows.lengths[rows.clips].sum())
  return Packed(
    row_tokens=rows.row_tokens,
    max_clips=rows.max_clips,
    clips=clips,
    unpackable=len(rows.unpackable),
    tokens=tokens,
    rows=rows.per_epoch,
    clips_per_row=clips / rows.per_epoch,
    padding_fraction=1 - tokens / (rows.per_epoch * rows.row_tokens),
  )


def as_text(name: str, found: Contents, rows: Packed | None) -> str:
  """Returns a table to read. `rows` is None if no config says how long rows are."""
  lines = [
    f"{name}: {found.clips:,} clips, {found.images:,} of them images; {found.hours:,.2f} hours",
    *_histogram("height x width", found.resolutions),
    *_histogram("frames", found.durations),
  ]
  if rows:
    lines += [
      f"  tokens              {rows.tokens:,} in {rows.clips:,} clips to train on",
      f"  rows of an epoch    {rows.rows:,} of {rows.row_tokens:,} tokens",
      f"  clips of a row      {rows.clips_per_row:.1f} on average, {rows.max_clips} at most",
      f"  padding             {rows.padding_fraction:.2%}",
      f"  too long for a row  {rows.unpackable:,} clips",
    ]
  return "\n".join(lines)


def encoders_text(dataset: Dataset) -> str:
  """Returns a line that says what encoded a dataset."""
  known = dataset.encoded_by
  if known is None:
    return "  encoded by          an earlier version, which did not say by which networks"
  digests = (
    f"{name} {(getattr(known, name) or 'unknown')[:12]}" for name in ("vae", "text_encoder")
  )
  return f"  encoded by          {known.model}; sha256 of {', '.join(digests)}"


def as_numbers(found: Contents, rows: Packed | None) -> dict[str, Any]:
  """Returns the same as JSON values."""
  return {**found._asdict(), "packing": rows._asdict() if rows else None}


def _histogram(title: str, counts: Mapping[str, int]) -> list[str]:
  most, total = max(counts.values()), sum(counts.values())
  return [f"  {title}"] + [
    f"    {value:>9}  {count:>12,}  {count / total:>4.0%}  {'#' * -(-BAR * count // most)}"
    for value, count in counts.items()
  ]
