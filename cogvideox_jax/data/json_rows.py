"""Reads rows of clips from JSON: a line each, an array, or an object that holds them all."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from cogvideox_jax.data import texts
from cogvideox_jax.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES

# The names of columns that hold a clip's file, in the order in which they are looked for: ours,
# those of Hugging Face's folders, and those of finetrainers, CogKit and musubi-tuner.
FILES = (
  *("file", "file_name", "filename", "video", "video_file", "video_path", "image"),
  *("image_file", "image_path", "media_path", "file_path", "filepath", "path"),
)

_Row = tuple[int, Any, str]  # The row's number from 1, its fields, and why it has none.


def read(data: bytes) -> Iterator[_Row]:
  """Yields the rows of a JSON file.

  Raises:
    UnicodeDecodeError: it has the signs of UTF-16, and is not.
  """
  encoding = texts.encoding_of(data)
  if encoding != "utf-8-sig":
    data = data.decode(encoding).encode()
  whole = _whole(data)
  if whole is not None:
    for number, fields in enumerate(whole, 1):
      yield _checked(number, fields)
    return
  # Split as bytes, because single lines may be in another encoding.
  for number, line in enumerate(data.split(b"\n"), 1):
    if line.strip():
      yield _parse(number, line)


def named(row: Mapping[Any, Any], names: Sequence[str]) -> Any:
  """Returns the first of the names that a row has, in the row's spelling; empty if it has none."""
  spelled = {str(name).strip().lower(): name for name in row}
  return next((spelled[name] for name in names if name in spelled), "")


def _whole(data: bytes) -> Sequence[Any] | None:
  """Returns the rows of a file that is one JSON value of several clips; None if it is not."""
  try:
    found = json.loads(data.decode("utf-8-sig"))
  except (ValueError, RecursionError):
    return None
  if isinstance(found, list):
    return found
  return _rows_of(found) if isinstance(found, dict) else None


def _rows_of(found: dict[str, Any]) -> Sequence[Any]:
  """Returns the rows of an object: columns, clips by their names, or a list among other things."""
  values = list(found.values())
  names = found.get(named(found, FILES))
  if isinstance(names, list) and all(
    isinstance(value, list) and len(value) == len(names) for value in values
  ):
    return [dict(zip(found, row, strict=True)) for row in zip(*values, strict=True)]
  suffixes = {PurePosixPath(name).suffix.lower() for name in found}
  if suffixes and suffixes <= {*IMAGE_SUFFIXES, *VIDEO_SUFFIXES}:
    return [
      {"file": name, **(value if isinstance(value, dict) else {"caption": value})}
      for name, value in found.items()
    ]
  lists = [value for value in values if isinstance(value, list) and value]
  rows = [value for value in lists if all(isinstance(row, dict) for row in value)]
  return rows[0] if len(rows) == 1 and names is None else [found]


def _parse(number: int, line: bytes) -> _Row:
  try:
    fields = json.loads(line.decode("utf-8-sig"))  # An editor may begin the file with a BOM.
  except UnicodeDecodeError:
    return number, None, "the line is not UTF-8"
  except (ValueError, RecursionError) as error:
    return number, None, f"the line is not JSON: {error}"
  return _checked(number, fields)


def _checked(number: int, fields: Any) -> _Row:
  if not isinstance(fields, dict):
    return number, None, "the line is not a JSON object"
  return number, fields, ""
