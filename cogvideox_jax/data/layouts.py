"""Reads the tables of clips that other tools write, by a small table of readers.

A reader turns a file into rows: a number, and the fields of one clip or the reason why there are
none. The fields get the names of our own manifest, by the names that other tools use.
"""

import csv
import importlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from cogvideox_jax.data import json_rows, texts
from cogvideox_jax.data.json_rows import FILES, named
from cogvideox_jax.errors import UserError

# The names of columns that hold a clip's caption, in the order in which they are looked for. Those
# of Hugging Face's folders, of finetrainers, CogKit and musubi-tuner are among them.
CAPTIONS = ("caption", "text", "prompt", "description")
# Names of tables in a folder, and of lists that belong together, in the order of preference.
TABLES = tuple(
  f"{stem}.{suffix}"
  for stem in ("manifest", "metadata", "dataset")
  for suffix in ("jsonl", "json", "csv", "tsv", "parquet")
)
FILE_LISTS = ("videos.txt", "video.txt", "images.txt", "image.txt")
CAPTION_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
EXAMPLE = '{"file": "a.mp4", "caption": "A cat jumps."}'


class OtherTableError(UserError):
  """A table is not one of clips."""


class Row(NamedTuple):
  """A line of a table."""

  number: int  # From 1.
  fields: Any  # A mapping if it is a sound line; None if there is a fault.
  fault: str = ""  # Why the line cannot be read.


def read_table(path: epath.Path) -> list[Row]:
  """Returns the rows of a table, whose fields have the names of our manifest.

  Raises:
    OtherTableError: none of its columns names a file, or a caption.
    UserError: it cannot be read.
  """
  reader = READERS.get(path.suffix.lower(), _json)
  try:
    rows = list(reader(path, path.read_bytes()))
  except OSError as error:
    raise UserError(f"the manifest {path} cannot be read: {error.strerror}.") from error
  except (UnicodeDecodeError, csv.Error) as error:
    raise UserError(
      f"{path} cannot be read ({error}).\nSave it as UTF-8, one row for each clip."
    ) from error
  if not rows:
    how = f"Write a line a clip, such as {EXAMPLE}"
    if path.suffix.lower() in (".csv", ".tsv"):
      how = "Name the columns in its first line, such as file,caption, and give each clip a row."
    raise UserError(f"the manifest {path} is empty.\n{how}")
  if all(row.fault for row in rows):
    raise OtherTableError(
      f"{path} is not a table of clips: none of its {len(rows)} lines can be read, the first\n"
      f"because {rows[0].fault}. Write JSON lines, such as {EXAMPLE}"
    )
  _check_columns(path, [row.fields for row in rows if isinstance(row.fields, Mapping)])
  return [row._replace(fields=_renamed(row.fields)) for row in rows]


def read_lists(files: epath.Path, captions: epath.Path) -> list[Row]:
  """Returns the rows of two lists: line n of one names the file, line n of the other its caption.

  Raises:
    UserError: they have different numbers of lines, or cannot be read.
  """
  columns = []
  for path in (files, captions):
    try:
      columns.append(texts.decode(path.read_bytes()).rstrip().split("\n"))
    except UnicodeDecodeError as error:
      raise UserError(f"{path} cannot be read ({error}).\nSave it as UTF-8.") from error
  names, words = columns
  if len(names) != len(words):
    raise UserError(
      f"{files} has {len(names)} lines, but {captions} has {len(words)}.\n"
      "Line n of one names a file, line n of the other is its caption."
    )
  pairs = enumerate(zip(names, words, strict=True), 1)
  return [
    Row(number, {"file": name, "caption": caption})
    for number, (name, caption) in pairs
    if name.strip() or caption.strip()
  ]


def find_lists(folder: epath.Path) -> tuple[epath.Path, epath.Path] | None:
  """Returns the list of files and the list of captions in a folder; None if one is missing."""
  found = [
    next((folder / name for name in names if (folder / name).is_file()), None)
    for names in (FILE_LISTS, CAPTION_LISTS)
  ]
  return (found[0], found[1]) if found[0] and found[1] else None


def find_table(folder: epath.Path) -> epath.Path | None:
  """Returns the table in a folder; None if there is none of the known names."""
  return next((folder / name for name in TABLES if (folder / name).is_file()), None)


def _json(_: epath.Path, data: bytes) -> Iterator[Row]:
  return (Row(*row) for row in json_rows.read(data))


def _csv(path: epath.Path, data: bytes) -> Iterator[Row]:
  """Rows with a header, separated by commas, semicolons, tabs or bars."""
  lines = io.StringIO(texts.decode(data), newline="")
  header = lines.readline()
  separator = max(
    ",;\t|", key=lambda sign: _known_names(next(csv.reader([header], delimiter=sign), []))
  )
  lines.seek(0)
  rows = csv.DictReader(lines, delimiter=separator)
  for row in rows:
    yield Row(rows.line_num, _with_number(_cells(row)))


def _known_names(header: Sequence[str]) -> tuple[int, int]:
  """Ranks a way to split a header: by the columns that have a known name, then by their number."""
  known = {*FILES, *CAPTIONS}
  return sum(name.strip().lower() in known for name in header), len(header)


def _cells(fields: Mapping[Any, Any]) -> dict[str, Any]:
  """Returns the cells of a row that are not empty.

  A column of captions may hold one text, which JSON would not call a list.
  """
  cells = {name: value for name, value in fields.items() if isinstance(name, str)}
  cells = {name: value for name, value in cells.items() if value not in (None, "")}
  if isinstance(cells.get("captions"), str) and "caption" not in cells:
    cells["caption"] = cells.pop("captions")
  return cells


def _with_number(cells: dict[str, Any]) -> dict[str, Any]:
  """Turns the score into a number, which in a CSV is a text."""
  try:
    return cells | {"score": float(cells["score"])} if "score" in cells else cells
  except ValueError:
    return cells  # The row is refused for it.


def _parquet(path: epath.Path, data: bytes) -> Iterator[Row]:
  try:
    parquet = importlib.import_module("pyarrow.parquet")
  except ImportError as error:
    raise UserError(
      f"{path} is a Parquet file, and reading it needs pyarrow: pip install pyarrow.\n"
      f"Or write it as JSON lines, such as {EXAMPLE}"
    ) from error
  arrow = importlib.import_module("pyarrow")
  try:
    table = parquet.read_table(io.BytesIO(data))
  except (arrow.ArrowException, OSError, ValueError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"{path} cannot be read: {reason}\nWrite it again.") from error
  for number, fields in enumerate(table.to_pylist(), 1):
    yield Row(number, _cells(fields))


READERS: Mapping[str, Callable[[epath.Path, bytes], Iterator[Row]]] = {
  ".csv": _csv,
  ".tsv": _csv,
  ".parquet": _parquet,
}


def _check_columns(path: epath.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Raises a UserError if a table, as a whole, is not one of clips."""
  columns = list(dict.fromkeys(name for row in rows for name in row))
  shown = ", ".join(map(str, columns[:12])) or "none"
  if rows and not any(named(row, FILES) for row in rows):
    raise OtherTableError(
      f"{path} has {len(rows)} rows with the columns {shown}: none of them names the clip's file.\n"
      f"Call it file (or {', '.join(FILES[1:6])}); its path starts from the manifest's folder."
    )
  if rows and not any(named(row, (*CAPTIONS, "captions")) for row in rows):
    raise OtherTableError(
      f"{path} has {len(rows)} rows with the columns {shown}: none of them is the caption.\n"
      f"Call it caption (or {', '.join(CAPTIONS[1:])})."
    )
  names = [row.get(named(row, FILES)) for row in rows]
  if any(isinstance(name, dict) for name in names):
    raise UserError(
      f"{path} holds the videos or images themselves, as Hugging Face's datasets may do.\n"
      f"Write them to files, with a line for each, such as {EXAMPLE}"
    )


def _renamed(fields: Any) -> Any:
  """Returns the fields with the names of our manifest."""
  if not isinstance(fields, Mapping):
    return fields
  ours = dict(fields)
  if "file" not in ours and (name := named(ours, FILES)):
    ours["file"] = ours.pop(name)
  if not {"caption", "captions"} & ours.keys() and (name := named(ours, CAPTIONS)):
    ours["caption"] = ours.pop(name)
  return ours
