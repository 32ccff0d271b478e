"""Draws frames of videos on one page, for people to look at."""

import io
import math
import os
import textwrap

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from cogvideox_jax.data.files import write_whole


def contact_sheet(
  videos: list[UInt8[np.ndarray, "_ _ _ 3"]],
  captions: list[str],
  path: str | os.PathLike[str],
) -> None:
  """Writes a PNG that shows each video's caption and below it up to 8 of its frames in a row."""
  rows = [_sheet_row(frames, caption) for frames, caption in zip(videos, captions, strict=True)]
  sheet = Image.new(
    "RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white"
  )
  top = 0
  for row in rows:
    sheet.paste(row, (0, top))
    top += row.height
  buffer = io.BytesIO()
  sheet.save(buffer, format="png")
  write_whole(path, buffer.getvalue())


def _sheet_row(frames: UInt8[np.ndarray, "F H W 3"], caption: str) -> Image.Image:
  """Draws one video of a contact sheet. Small frames are enlarged without smoothing."""
  num_frames, height, width, _ = frames.shape
  scale = 256 / max(height, width)
  scale = max(1, round(scale)) if scale > 0.5 else scale
  cell_width, cell_height = round(width * scale), round(height * scale)
  resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
  picked = np.unique(np.linspace(0, num_frames - 1, 8).round().astype(int))
  font, line, gap = ImageFont.load_default(size=14), 18, 2
  row_width = len(picked) * (cell_width + gap)
  lines = textwrap.wrap(caption, max(20, row_width // 8)) or [""]
  row_width = max(row_width, *(math.ceil(font.getlength(text)) + 8 for text in lines))
  row = Image.new("RGB", (row_width, len(lines) * line + cell_height + 3 * gap), "white")
  ImageDraw.Draw(row).text((4, gap), "\n".join(lines), fill="black", font=font, spacing=4)
  for column, index in enumerate(picked):
    cell = Image.fromarray(frames[index]).resize((cell_width, cell_height), resampling)
    row.paste(cell, (column * (cell_width + gap), len(lines) * line + 2 * gap))
  return row
