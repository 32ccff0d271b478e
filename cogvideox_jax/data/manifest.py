"""Reads which files to train on, and their captions, from a manifest or a folder.

A line or file that cannot be used is refused with its line number and a reason. It never stops the
others.
"""

import json
import math
import os
import re
from typing import Any, NamedTuple

from etils import epath

from cogvideox_jax.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, not_a_file
from cogvideox_jax.errors import UserError

MANIFEST = "manifest.jsonl"
_EXAMPLE = '{"file": "a.mp4", "caption": "A cat jumps."}'


class Item(NamedTuple):
  """A file to use."""

  id: str  # Unique among the items; the file's name in the manifest unless that gives an id.
  file: epath.Path
  captions: tuple[str, ...]  # At least one.
  score: float | None  # The user's own measure of the clip.
  line: int  # The line number in the manifest, from 1; 0 in a folder without one.
  name: str  # The file's name, as the manifest or the folder has it.


class Refusal(NamedTuple):
  """A line or file that is left out: one object of quarantine.jsonl."""

  file: str  # The file's name in the manifest; empty if the line names no file.
  line: int  # As in `Item`.
  reason: str


class _RefusedError(Exception):
  """A line or file is left out; the message is the reason, in one line."""


def read_manifest(path: epath.PathLike) -> tuple[list[Item], list[Refusal]]:
  """Reads a manifest, a folder that holds manifest.jsonl, or a folder of NAME.mp4 and NAME.txt.

  A manifest has one JSON object a line: `file` (relative to the manifest, inside its folder),
  `caption` or several `captions`, and optionally `id` and `score`. Items keep the order of the
  manifest. A folder without a manifest gives its items in the order of their names; folders inside
  it are not searched.

  Returns:
    The items, and what was refused.

  Raises:
    UserError: there is no such path, or nothing in it.
  """
  path = epath.Path(path)
  manifest = path / MANIFEST if path.is_dir() else path
  if path.is_dir() and not manifest.exists():
    return _read_folder(path)
  if not manifest.is_file():
    raise UserError(
      f"there is no manifest or folder at {path}.\n"
      f"Give a folder of videos with a text each, or a file of JSON lines such as {_EXAMPLE}"
    )
  if manifest.suffix.lower() in VIDEO_SUFFIXES + IMAGE_SUFFIXES:
    raise UserError(f"{manifest} is a single clip.\nGive its folder, or a manifest that names it.")
  return _read_lines(manifest)


def _read_lines(manifest: epath.Path) -> tuple[list[Item], list[Refusal]]:
  try:
    # Read as bytes, because single lines may be in another encoding.
    lines = manifest.read_bytes().split(b"\n")
  except OSError as error:
    raise UserError(f"the manifest {manifest} cannot be read: {error.strerror}.") from error
  items: dict[str, Item] = {}
  refusals = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    fields = {}
    try:
      fields = _parse(line)
      item = _item(fields, manifest.parent, number)
      if item.id in items:
        raise _RefusedError(f"the id {item.id!r} is that of line {items[item.id].line} already")
      items[item.id] = item
    except _RefusedError as refused:
      refusals.append(Refusal(str(fields.get("file", "")), number, str(refused)))
  if not items and not refusals:
    raise UserError(f"the manifest {manifest} is empty.\nWrite a line a clip, such as {_EXAMPLE}")
  return list(items.values()), refusals


def _read_folder(folder: epath.Path) -> tuple[list[Item], list[Refusal]]:
  suffixes = VIDEO_SUFFIXES + IMAGE_SUFFIXES
  names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in suffixes)
  if not names:
    raise UserError(
      f"the folder {folder} holds no clips.\n"
      f"Put videos ({', '.join(VIDEO_SUFFIXES)}) or images ({', '.join(IMAGE_SUFFIXES)}) there, "
      f"each with its caption in a file NAME.txt; or a {MANIFEST} of lines such as {_EXAMPLE}"
    )
  items, refusals = [], []
  for name in names:
    try:
      caption = _read_text(os.path.splitext(name)[0] + ".txt", folder)
      items.append(Item(_text(name, "file"), _inside(name, folder), (caption,), None, 0, name))
    except _RefusedError as refused:
      refusals.append(Refusal(name, 0, str(refused)))
  return items, refusals


def _read_text(name: str, folder: epath.Path) -> str:
  if not (folder / name).exists():
    raise _RefusedError(f"no caption: there is no {name}")
  try:
    return _text(_inside(name, folder).read_bytes().decode("utf-8-sig"), "caption")
  except (OSError, UnicodeDecodeError) as error:
    raise _RefusedError(f"no caption: {name} cannot be read as UTF-8 text") from error


def _parse(line: bytes) -> dict[str, Any]:
  try:
    fields = json.loads(line.decode("utf-8-sig"))  # An editor may begin the file with a BOM.
  except UnicodeDecodeError as error:
    raise _RefusedError("the line is not UTF-8") from error
  except (ValueError, RecursionError) as error:
    raise _RefusedError(f"the line is not JSON: {error}") from error
  if not isinstance(fields, dict):
    raise _RefusedError("the line is not a JSON object")
  return fields


def _item(fields: dict[str, Any], folder: epath.Path, line: int) -> Item:
  name = _text(fields.get("file"), "file")
  captions = fields.get("captions", [])
  if not isinstance(captions, list):
    raise _RefusedError("captions is not a list")
  if "caption" in fields:
    captions = [fields["caption"], *captions]
  if not captions:
    raise _RefusedError("no caption")
  id_ = _text(fields.get("id", name), "id")
  if re.search(r"#\d+$", id_):
    raise _RefusedError(f"the id {id_!r} ends as the names of clips that are cut from one file do")
  score = fields.get("score")
  if score is not None and (type(score) not in (int, float) or not math.isfinite(score)):
    raise _RefusedError("score is not a number")
  return Item(
    id=id_,
    file=_inside(name, folder),
    captions=tuple(_text(caption, "caption") for caption in captions),
    score=None if score is None else float(score),
    line=line,
    name=name,
  )


def _text(value: Any, key: str) -> str:
  """Returns the value as a string that is not empty and can be written to a file again."""
  if value is None:
    raise _RefusedError(f"no {key}")
  if not isinstance(value, str):
    raise _RefusedError(f"{key} is not a text")
  text = value.strip()
  if not text:
    raise _RefusedError(f"no {key}")
  if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
    raise _RefusedError(f"{key} holds a character that is none")
  return text


def _inside(name: str, folder: epath.Path) -> epath.Path:
  """Returns the file of that name; refuses one outside the folder, also if a link leads there."""
  root, real = os.path.realpath(folder), os.path.realpath(folder / name)
  if os.path.isabs(name) or "://" in name or os.path.commonpath([root, real]) != root:
    raise _RefusedError("the file is outside the manifest's folder")
  file = folder / name
  if reason := not_a_file(file):
    raise _RefusedError(reason)
  return file
