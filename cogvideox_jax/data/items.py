"""What a manifest or a folder gives: files to use with their captions, and what is left out."""

import math
import posixpath
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from cogvideox_jax.data.places import RefusedError, inside

CAPTION = 4096  # Characters. The text encoder sees 226 tokens, and a token has at most 16.
NAME = 8192  # Characters of a file's name or an id.


class Item(NamedTuple):
  """A file to use."""

  id: str  # Unique among the items; the file's name in the manifest unless that gives an id.
  file: epath.Path
  captions: tuple[str, ...]  # At least one.
  score: float | None  # The user's own measure of the clip.
  line: int  # The line or row in the manifest, from 1; 0 in a folder without one.
  name: str  # The file's name, as the manifest or the folder has it.


class Refusal(NamedTuple):
  """A line or file that is left out: one object of quarantine.jsonl."""

  file: str  # The file's name in the manifest; empty if the line names no file.
  line: int  # As in `Item`.
  reason: str


class Source(NamedTuple):
  """What a manifest or a folder gives."""

  items: list[Item]
  refusals: list[Refusal]
  notes: list[str]  # Lines for the user: how it was read, and what was passed over.


def make_item(fields: Mapping[str, Any], folder: epath.Path, line: int, allow_links: bool) -> Item:
  """Returns the item of a line of a manifest.

  Args:
    fields: `file`, `caption` or `captions`, and maybe `id` and `score`.
    folder: the folder that the file's name starts from, and which it must not leave.
    line: its number.
    allow_links: whether a link may lead out of the folder.

  Raises:
    RefusedError: it cannot be used.
  """
  name = text(fields.get("file"), "file")
  captions = fields.get("captions", [])
  if not isinstance(captions, list):
    raise RefusedError("captions is not a list")
  if "caption" in fields:
    captions = [fields["caption"], *captions]
  if not captions:
    raise RefusedError("no caption")
  # "./a.mp4" is the file "a.mp4".
  id_ = text(fields.get("id", posixpath.normpath(name)), "id")
  if re.search(r"#\d+$", id_):
    raise RefusedError(f"the id {id_!r} ends as the names of clips that are cut from one file do")
  score = fields.get("score")
  if score is not None and (type(score) not in (int, float) or not math.isfinite(score)):
    raise RefusedError("score is not a number")
  return Item(
    id=id_,
    file=inside(name, folder, allow_links),
    captions=tuple(text(caption, "caption") for caption in captions),
    score=None if score is None else float(score),
    line=line,
    name=name,
  )


def text(value: Any, key: str) -> str:
  """Returns the value as a string that is not empty and can be written to a file again.

  A caption is cut at CAPTION characters; a name that is longer than NAME is refused.
  """
  if value is None:
    raise RefusedError(f"no {key}")
  if not isinstance(value, str):
    raise RefusedError(f"{key} is not a text")
  found = value.strip()
  if not found:
    raise RefusedError(f"no {key}")
  if "\0" in found or any("\ud800" <= letter <= "\udfff" for letter in found):
    raise RefusedError(f"{key} holds a character that is none")
  if key == "caption":
    return found[:CAPTION].rstrip()
  if len(found) > NAME:
    raise RefusedError(f"{key} has {len(found)} characters; it may have {NAME}")
  return found
