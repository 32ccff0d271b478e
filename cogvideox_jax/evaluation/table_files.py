"""Writes the table of VAEs: table.md, and table.png with a bar for each figure."""

import io
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath
from PIL import Image, ImageDraw, ImageFont

from cogvideox_jax.data.files import disk_errors, write_atomically
from cogvideox_jax.evaluation.vae_table import Row


class _Column(NamedTuple):
  name: str  # In a row.
  title: str
  decimals: int = 3
  better: str = ""  # "higher" or "lower"; empty if neither is.


FIGURES = (
  _Column("psnr", "PSNR, dB (mean over frames)", 2, "higher"),
  _Column("psnr_clip", "PSNR, dB (whole clip)", 2, "higher"),
  _Column("ssim", "SSIM", 4, "higher"),
  _Column("lpips", "LPIPS", 4, "lower"),
  _Column("fvd", "FVD", 2, "lower"),
  _Column("flicker", "flicker, 0..255", 3),
  _Column("flicker_source", "flicker of the source", 3),
  _Column("flicker_excess", "excess flicker", 3),
  _Column("vbench_flickering", "VBench's temporal flickering", 4, "higher"),
)
FACTS = (
  _Column("model", "model"),
  _Column("compression", "compression"),
  _Column("channels", "channels"),
  _Column("parameters", "parameters"),
)
TRAINING = (
  _Column("train_steps", "steps"),
  _Column("train_seconds", "seconds", 0),
  _Column("seed", "seed"),
)
MISSING = "–"


def write(folder: epath.Path, rows: Sequence[Row], lines: Sequence[str]) -> None:
  """Writes FOLDER/table.md and FOLDER/table.png.

  Args:
    lines: what is said below the table: clips, flavours and notes.

  Raises:
    UserError: the folder cannot be written.
  """
  buffer = io.BytesIO()
  _picture(rows, lines).save(buffer, format="png")
  with disk_errors(folder):
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "table.md", markdown(rows, lines).encode())
    write_atomically(folder / "table.png", buffer.getvalue())


def markdown(rows: Sequence[Row], lines: Sequence[str]) -> str:
  """Returns the table, and the lines below it."""
  columns = (*FACTS, *FIGURES, *TRAINING)
  table = [[column.title for column in columns], ["---"] * len(columns)]
  table += [[_text(row, column) for column in columns] for row in rows]
  text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
  return "\n\n".join([text, *lines]) + "\n"


def _text(row: Row, column: _Column) -> str:
  value = row[column.name]
  if value is None:
    return MISSING
  if isinstance(value, list):
    return ", ".join(map(str, value))
  if isinstance(value, float):
    deviation = row.get("deviations", {}).get(column.name)
    spread = "" if deviation is None else f" ± {deviation:.{column.decimals}f}"
    return f"{value:.{column.decimals}f}{spread}"
  return str(value).replace("|", "\\|")


FONT, SMALL = ImageFont.load_default(size=15), ImageFont.load_default(size=13)
LINE, GAP, BAR = 20, 12, 260  # Pixels.
COLOURS = ((78, 121, 167), (242, 142, 43), (89, 161, 79), (176, 122, 161), (156, 117, 95))


def _picture(rows: Sequence[Row], lines: Sequence[str]) -> Image.Image:
  """Draws a panel of bars for each figure, two panels beside each other."""
  names = [f"{row['model']} ({row['compression']}, {row['channels']} ch)" for row in rows]
  label = int(max(SMALL.getlength(name) for name in names)) + GAP
  values = [SMALL.getlength(_text(row, column)) for row in rows for column in FIGURES]
  wide = label + BAR + int(max(values)) + GAP
  tall = LINE * (len(rows) + 1) + GAP
  shown = [column for column in FIGURES if any(row[column.name] is not None for row in rows)]
  height = GAP + tall * ((len(shown) + 1) // 2) + LINE * len(lines) + GAP
  width = max(2 * wide + 3 * GAP, *(int(SMALL.getlength(line)) + 2 * GAP for line in lines), 0)
  sheet = Image.new("RGB", (width, height), "white")
  draw = ImageDraw.Draw(sheet)
  for number, column in enumerate(shown):
    left = GAP + (number % 2) * (wide + GAP)
    _panel(draw, (left, GAP + tall * (number // 2)), label, rows, names, column)
  for number, line in enumerate(lines):
    line = line.replace("²", "^2")  # The font lacks it.
    draw.text((GAP, height - GAP - LINE * (len(lines) - number)), line, fill="black", font=SMALL)
  return sheet


def _panel(
  draw: ImageDraw.ImageDraw,
  corner: tuple[int, int],
  label: int,
  rows: Sequence[Row],
  names: Sequence[str],
  column: _Column,
) -> None:
  """Draws the bars of one figure, from zero. A bar of a negative one is empty."""
  left, top = corner
  better = f" ({column.better} is better)" if column.better else ""
  draw.text((left, top), column.title + better, fill="black", font=FONT)
  most = max(abs(row[column.name] or 0) for row in rows) or 1
  for number, (row, name) in enumerate(zip(rows, names, strict=True)):
    upper = top + LINE * (number + 1)
    draw.text((left, upper), name, fill="black", font=SMALL)
    value = row[column.name] or 0
    length, start = round(BAR * abs(value) / most), left + label
    if length:
      colour = COLOURS[number % len(COLOURS)]
      box = (start, upper + 3, start + length, upper + LINE - 4)
      draw.rectangle(box, fill=colour if value > 0 else None, outline=colour)
    draw.text((start + length + 6, upper), _text(row, column), fill="black", font=SMALL)
