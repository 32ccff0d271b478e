"""Pairs the clips of a folder with their captions: NAME.mp4 with NAME.txt.

Rules, each with a line that says how often it applied:

- A clip is a file whose suffix FFmpeg or Pillow reads. Other files are passed over.
- Its caption is NAME.txt beside it, in any case; in folders that SAT trains on, labels/NAME.txt for
  videos/NAME.mp4.
- Hidden files and folders, and those that systems keep beside (`__MACOSX`, `@eaDir`), are passed
  over, and so are folders that `encode` or a training wrote.
- A picture with the name of a video beside it is the video's thumbnail, and passed over.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from etils import epath

from cogvideox_jax.data import texts
from cogvideox_jax.data.first_bytes import HEIC, HEIC_SUFFIXES
from cogvideox_jax.data.items import Item, Refusal, Source, text
from cogvideox_jax.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from cogvideox_jax.data.places import RefusedError, inside, is_bucket
from cogvideox_jax.errors import UserError

_KEPT_BESIDE = ("__macosx", "@eadir", "$recycle.bin", "lost+found")
# One of them stands in each folder that `encode` or a training wrote.
_WRITTEN = {"shards.json", "quarantine.jsonl", "metrics.jsonl"}
# Tables and archives of other tools.
_TABLES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".tar", ".zip")
TEXT_BYTES = 2**20  # Bytes of a caption's file.
_SHOWN = 8  # The most kinds of files that a line counts.


_Level = tuple[str, list[str], list[str]]  # A folder's path in the top one, its folders and files.


class _Walked(NamedTuple):
  files: list[PurePosixPath]  # Relative to the folder, in order.
  passed: Counter[str]  # What was not walked or taken, by kind.


def read_folder(folder: epath.Path, *, subfolders: bool, allow_links: bool) -> Source:
  """Returns the clips of a folder that have captions, in the order of their names.

  Args:
    subfolders: whether folders inside it are searched.
    allow_links: whether links may lead out of it.

  Raises:
    UserError: it holds no clip, or no clip has a caption.
  """
  files, passed = _walk(folder, subfolders, allow_links)
  clips = [file for file in files if _suffix(file) in IMAGE_SUFFIXES + VIDEO_SUFFIXES]
  videos = {file.with_suffix("") for file in clips if _suffix(file) in VIDEO_SUFFIXES}
  thumbnails = {
    file for file in clips if _suffix(file) in IMAGE_SUFFIXES and file.with_suffix("") in videos
  }
  clips = [file for file in clips if file not in thumbnails]
  captions = _Captions(files)
  if not clips or not any(map(captions.of, clips)):
    raise UserError(_nothing(folder, clips, files, passed))
  items, refusals = [], []
  for clip in clips:
    try:
      items.append(_pair(clip, captions.of(clip), folder, allow_links))
    except RefusedError as refused:
      refusals.append(Refusal(str(clip), 0, str(refused)))
  if thumbnails:
    passed["picture(s) with the name of a video beside it (its thumbnail)"] += len(thumbnails)
  passed.update(_others(files, {*clips, *thumbnails, *map(captions.of, clips)}))
  notes = [f"Passed over in {folder}: {_counted(passed)}."] if passed else []
  if any(passed[suffix] for suffix in HEIC_SUFFIXES):
    notes.append(f"The photos are {HEIC}.")
  return Source(items, refusals, notes)


class _Captions:
  """Finds the texts of clips."""

  def __init__(self, files: Iterable[PurePosixPath]):
    self._texts: dict[PurePosixPath, PurePosixPath] = {}
    for file in files:
      if _suffix(file) == ".txt":
        known = self._texts.get(file.with_suffix(""))
        if known is None or file.suffix == ".txt":  # That spelling comes before .TXT.
          self._texts[file.with_suffix("")] = file

  def of(self, clip: PurePosixPath) -> PurePosixPath | None:
    """Returns the text of a clip; None if there is none."""
    stem = clip.with_suffix("")
    if stem in self._texts:
      return self._texts[stem]
    parts = stem.parts
    for number, part in enumerate(parts[:-1]):
      if part == "videos":
        labels = PurePosixPath(*parts[:number], "labels", *parts[number + 1 :])
        if labels in self._texts:
          return self._texts[labels]
    return None


def _walk(folder: epath.Path, subfolders: bool, allow_links: bool) -> _Walked:
  """Lists the files of a folder that are not hidden, and counts what was not searched."""
  files, passed, seen = [], Counter(), set()
  walk = _walk_bucket(folder) if is_bucket(folder) else _walk_disk(folder, allow_links)
  for place, folders, names in walk:
    real = os.path.realpath(folder / place)  # In a bucket there are no links, nor circles of them.
    if real in seen:
      passed["link(s) in a circle"] += 1
      folders.clear()
      continue
    seen.add(real)
    if place != "." and _WRITTEN & set(names):
      passed["folder(s) that encode or a training wrote"] += 1
      folders.clear()
      continue
    passed.update(_prune(folder / place, folders, subfolders, allow_links))
    hidden = [name for name in names if _is_hidden(name)]
    if hidden:
      passed["hidden file(s)"] += len(hidden)
    files += [PurePosixPath(place) / name for name in names if not _is_hidden(name)]
  return _Walked(sorted(files, key=str), passed)


def _walk_disk(folder: epath.Path, allow_links: bool) -> Iterator[_Level]:
  for root, folders, names in os.walk(folder, followlinks=allow_links):
    yield os.path.relpath(root, folder), folders, names


def _walk_bucket(folder: epath.Path) -> Iterator[_Level]:
  """Walks a bucket, and leaves out what is below a folder that was taken from the list."""
  top = os.fspath(folder).split("://")[-1].strip("/")
  kept = {"."}
  for root, folders, names in folder.walk():
    # Some file systems give the root without its scheme.
    place = os.fspath(root).split("://")[-1].strip("/").removeprefix(top).strip("/") or "."
    if place in kept:
      level = list(folders)
      yield place, level, list(names)
      kept |= {str(PurePosixPath(place) / name) for name in level}


def _prune(
  root: epath.Path, folders: list[str], subfolders: bool, allow_links: bool
) -> Counter[str]:
  """Takes the folders out of the list that are not to be walked; returns how many of each kind."""
  passed, kept = Counter(), []
  for name in folders:
    if _is_hidden(name):
      passed["hidden folder(s)"] += 1
    elif not subfolders:
      passed["sub-folder(s), by --nosubfolders"] += 1
    elif not allow_links and os.path.islink(root / name):
      passed["link(s) to folders, which --allow_links follows"] += 1
    else:
      kept.append(name)
  folders[:] = sorted(kept)
  return passed


def _is_hidden(name: str) -> bool:
  return name.startswith(".") or name.lower() in _KEPT_BESIDE


def _suffix(file: PurePosixPath) -> str:
  return file.suffix.lower()


def _others(files: Iterable[PurePosixPath], used: set[PurePosixPath | None]) -> Counter[str]:
  """Counts the files that are neither clips nor captions, by suffix."""
  kinds = Counter()
  for file in files:
    if file not in used:
      suffix = _suffix(file)
      kinds[
        "text(s) without a clip (.txt)" if suffix == ".txt" else suffix or "without a suffix"
      ] += 1
  return kinds


def _pair(
  clip: PurePosixPath, caption: PurePosixPath | None, folder: epath.Path, allow_links: bool
) -> Item:
  name = str(clip)
  if caption is None:
    raise RefusedError(f"no caption: there is no {clip.with_suffix('.txt')}")
  try:
    found = inside(str(caption), folder, allow_links)
    if (size := found.stat().length) > TEXT_BYTES:
      raise RefusedError(f"no caption: {caption} has {size} bytes; it may have {TEXT_BYTES}")
    words = texts.decode(found.read_bytes())
  except (OSError, UnicodeDecodeError) as error:
    raise RefusedError(f"no caption: {caption} cannot be read as UTF-8 text") from error
  file = inside(name, folder, allow_links)
  return Item(text(name, "file"), file, (text(words, "caption"),), None, 0, name)


def _counted(kinds: Counter[str]) -> str:
  ordered = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
  shown = [f"{count} {kind}" for kind, count in ordered[:_SHOWN]]
  if rest := sum(count for _, count in ordered[_SHOWN:]):
    shown.append(f"{rest} others")
  return ", ".join(shown)


def _nothing(
  folder: epath.Path,
  clips: list[PurePosixPath],
  files: list[PurePosixPath],
  passed: Counter[str],
) -> str:
  """Says why a folder gives no item, by what is in it."""
  passed = passed + _others(files, set(clips))
  lines = [
    f"none of the {len(clips)} clips of the folder {folder} has a caption."
    if clips
    else f"the folder {folder} holds no clips."
  ]
  if passed:
    lines.append(f"There are: {_counted(passed)}.")
  if any(passed[suffix] for suffix in HEIC_SUFFIXES):
    lines.append(f"The photos are {HEIC}.")
  tables = [str(file) for file in files if _suffix(file) in _TABLES]
  if any(name.lower().endswith((".tar", ".zip")) for name in tables):
    lines.append("Archives, such as WebDataset's .tar shards, are not read: unpack them first.")
  elif tables:
    lines.append(f"If {tables[0]} names the clips and their captions, give it as --input.")
  lines.append(
    "Put videos (.mp4, .mov, .webm, .mkv, ...) or images (.jpg, .png, ...) there, each with its "
    "caption in\na file NAME.txt; or a manifest.jsonl of lines such as "
    '{"file": "a.mp4", "caption": "A cat jumps."}'
  )
  return "\n".join(lines)
