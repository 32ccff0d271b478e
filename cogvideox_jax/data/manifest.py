"""Reads which files to train on, and their captions, from a manifest or a folder.

A line or file that cannot be used is refused with its line number and a reason. It never stops the
others.
"""

import os
import re
from collections.abc import Sequence

from etils import epath

from cogvideox_jax.data import layouts
from cogvideox_jax.data.clip_folder import read_folder
from cogvideox_jax.data.items import NAME, Item, Refusal, Source, make_item
from cogvideox_jax.data.layouts import EXAMPLE, OtherTableError, Row
from cogvideox_jax.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from cogvideox_jax.data.places import RefusedError
from cogvideox_jax.errors import UserError

MANIFEST = "manifest.jsonl"
# What etils.epath needs for a bucket.
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}


def read_manifest(
  path: epath.PathLike, *, subfolders: bool = True, allow_links: bool = False
) -> Source:
  """Reads a manifest, a folder that holds one, or a folder of NAME.mp4 and NAME.txt.

  A manifest has one JSON object a line: `file` (relative to the manifest, inside its folder),
  `caption` or several `captions`, and optionally `id` and `score`. Items keep the order of the
  manifest. Tables of other tools are read, too: see layouts.py. clip_folder.py says which files of
  a folder without a manifest are clips.

  Args:
    subfolders: whether folders inside a folder without a manifest are searched.
    allow_links: whether links may lead out of the folder.

  Raises:
    UserError: there is no such path, or nothing in it, or it is of a layout that is not read.
  """
  path = _existing(path)
  if not path.is_dir():
    return _read_table(path, allow_links)
  if table := layouts.find_table(path):
    try:
      found = _read_table(table, allow_links)
      notes = [] if table.name == MANIFEST else [f"Read {table.name} of {path}."]
      return found._replace(notes=notes)
    except OtherTableError as other:
      if table.stem == "manifest":
        raise
      # It may belong to something else, and the clips have their captions beside them.
      return _folder_with_table(path, other, subfolders, allow_links)
  if lists := layouts.find_lists(path):
    rows = layouts.read_lists(*lists)
    notes = [f"Read {lists[0].name} and {lists[1].name} of {path}, line by line."]
    return _of_rows(rows, path, allow_links, notes)
  return read_folder(path, subfolders=subfolders, allow_links=allow_links)


def _folder_with_table(
  folder: epath.Path, other: OtherTableError, subfolders: bool, allow_links: bool
) -> Source:
  """Returns the clips beside a table that is not one of clips; raises `other` if there are none."""
  try:
    found = read_folder(folder, subfolders=subfolders, allow_links=allow_links)
  except UserError as error:
    raise other from error
  return found._replace(notes=[str(other).splitlines()[0], *found.notes])


def _existing(path: epath.PathLike) -> epath.Path:
  """Returns the path of something that exists."""
  given = os.fspath(path)
  scheme = match[1] if (match := re.match(r"(\w+):/", given)) else ""
  if scheme and scheme not in _PACKAGES:
    raise UserError(
      f"{given} is a URL, and nothing is downloaded.\n"
      "Fetch the files into a folder, and give the folder."
    )
  path = epath.Path(given)
  try:
    there = path.is_dir() or path.is_file()
  except ImportError as error:
    raise UserError(
      f"{given} is in a bucket, and reading it needs {_PACKAGES[scheme]}: "
      f"pip install {_PACKAGES[scheme]}.\nOr copy the files into a folder ({error})."
    ) from error
  except (OSError, ValueError, RuntimeError) as error:
    raise UserError(f"{given} cannot be reached: {error}") from error
  if not there:
    raise UserError(
      f"there is no manifest or folder at {given}.\n"
      f"Give a folder of videos with a text each, or a file of JSON lines such as {EXAMPLE}"
    )
  return path


def _read_table(manifest: epath.Path, allow_links: bool) -> Source:
  suffix = manifest.suffix.lower()
  if suffix in VIDEO_SUFFIXES + IMAGE_SUFFIXES:
    raise UserError(f"{manifest} is a single clip.\nGive its folder, or a manifest that names it.")
  if suffix in (".tar", ".zip", ".gz", ".tgz"):
    raise UserError(f"{manifest} is an archive.\nUnpack it, and give its folder.")
  is_list = manifest.name in layouts.FILE_LISTS + layouts.CAPTION_LISTS
  if is_list and (lists := layouts.find_lists(manifest.parent)):
    return _of_rows(layouts.read_lists(*lists), manifest.parent, allow_links, [])
  return _of_rows(layouts.read_table(manifest), manifest.parent, allow_links, [])


def _of_rows(
  rows: Sequence[Row], folder: epath.Path, allow_links: bool, notes: list[str]
) -> Source:
  items: dict[str, Item] = {}
  refusals = []
  for number, fields, fault in rows:
    try:
      if fault:
        raise RefusedError(fault)
      item = make_item(fields, folder, number, allow_links)
      if item.id in items:
        raise RefusedError(f"the id {item.id!r} is that of line {items[item.id].line} already")
      items[item.id] = item
    except RefusedError as refused:
      name = str(fields.get("file", ""))[:NAME] if fields else ""
      refusals.append(Refusal(name, number, str(refused)))
  return Source(list(items.values()), refusals, notes)
