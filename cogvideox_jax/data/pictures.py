"""Draws pictures of an encoded dataset: how its rows are packed, and what its clips show."""

import colorsys
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from cogvideox_jax.data.files import disk_errors, write_atomically
from cogvideox_jax.data.rows import Rows

FONT = ImageFont.load_default(size=13)
LINE, GAP = 18, 6  # Pixels: the height of a line of text, and the space between things.
BAR_WIDTH, BAR_HEIGHT = 1200, 14
TEXT_COLOUR, PADDING_COLOUR = (60, 60, 60), (225, 225, 225)
CELL, COLUMNS, LABEL_LINES = 200, 6, 3  # The clip sheet's cells, in pixels; its labels.

Image8 = UInt8[np.ndarray, "_ _ 3"]
Colour = tuple[int, int, int]


class Tile(NamedTuple):
  """A clip on the clip sheet."""

  image: Image8
  label: list[str]  # Up to LABEL_LINES lines.


def packing_picture(rows: Rows, count: int, title: str, path: epath.Path) -> None:
  """Draws the first rows of the first epoch as bars of clips, each after its text tokens.

  Each height and width has a colour. The more frames a clip has, the darker it is.
  """
  index = rows.dataset.index
  count = min(count, rows.per_epoch)
  drawn = [rows[number].clips for number in range(count)]
  sizes = sorted(
    {(int(index.height[clip]), int(index.width[clip])) for clips in drawn for clip in clips},
    key=lambda size: (size[0] * size[1], size),
  )
  longest = int(index.num_frames.max())
  legend = [("text", TEXT_COLOUR), ("padding", PADDING_COLOUR)]
  legend += [(f"{h}x{w}", _colour(n, len(sizes), 0.5)) for n, (h, w) in enumerate(sizes)]
  top = LINE + _legend_lines(legend) * LINE + 2 * GAP
  sheet = Image.new("RGB", (BAR_WIDTH + 2 * GAP, top + count * (BAR_HEIGHT + 2) + GAP), "white")
  draw = ImageDraw.Draw(sheet)
  draw.text((GAP, GAP), title, fill="black", font=FONT)
  _draw_legend(draw, legend, LINE + GAP)

  def box(start: int, end: int, line: int) -> tuple[int, int, int, int]:
    left, right = (GAP + BAR_WIDTH * at // rows.row_tokens for at in (start, end))
    upper = top + line * (BAR_HEIGHT + 2)
    return left, upper, max(right - 1, left), upper + BAR_HEIGHT - 1

  for line, clips in enumerate(drawn):
    draw.rectangle(box(0, rows.row_tokens, line), fill=PADDING_COLOUR)
    start = 0
    for clip in clips.tolist():
      size = int(index.height[clip]), int(index.width[clip])
      shade = int(index.num_frames[clip]) / longest
      middle, end = start + int(index.text_shape[clip, 0]), start + int(rows.lengths[clip])
      draw.rectangle(box(middle, end, line), fill=_colour(sizes.index(size), len(sizes), shade))
      draw.rectangle(box(start, middle, line), fill=TEXT_COLOUR)
      start = end
  _save(sheet, path)


def clip_sheet(tiles: Sequence[Tile], title: str, path: epath.Path) -> None:
  """Draws pictures of clips on one page, each above its label."""
  lines = -(-len(tiles) // COLUMNS)
  height = CELL + LABEL_LINES * LINE + GAP
  sheet = Image.new("RGB", (COLUMNS * (CELL + GAP) + GAP, lines * height + LINE + GAP), "white")
  draw = ImageDraw.Draw(sheet)
  draw.text((GAP, GAP // 2), title, fill="black", font=FONT)
  for number, tile in enumerate(tiles):
    left = GAP + number % COLUMNS * (CELL + GAP)
    top = LINE + GAP + number // COLUMNS * height
    image = _fit(tile.image)
    sheet.paste(image, (left + (CELL - image.width) // 2, top + (CELL - image.height) // 2))
    for line, text in enumerate(tile.label[:LABEL_LINES]):
      draw.text((left, top + CELL + line * LINE), _cut(text), fill="black", font=FONT)
  _save(sheet, path)


def false_colours(latents: Sequence[Float[np.ndarray, "_ _ c"]]) -> list[Image8]:
  """Shows latents without a decoder: their three principal components over all clips, as RGB.

  The pictures show outlines. Their colours are not those of the clips.
  """
  pixels = [image.reshape(-1, image.shape[-1]).astype(np.float32) for image in latents]
  everything = np.concatenate(pixels)
  centre = everything.mean(axis=0)
  _, vectors = np.linalg.eigh(np.cov(everything - centre, rowvar=False))
  axes = vectors[:, ::-1][:, :3]  # The largest first.
  projected = [(image - centre) @ axes for image in pixels]
  low, high = np.percentile(np.concatenate(projected), [1, 99], axis=0)
  spread = np.maximum(high - low, 1e-6)  # All clips may be alike.
  return [
    np.uint8(255 * np.clip((colours - low) / spread, 0, 1)).reshape(*image.shape[:2], 3)
    for colours, image in zip(projected, latents, strict=True)
  ]


def _colour(number: int, count: int, shade: float) -> Colour:
  """Returns the number-th of `count` hues; shade is in [0, 1], from light to dark."""
  red, green, blue = colorsys.hls_to_rgb(number / count, 0.78 - 0.4 * shade, 0.65)
  return round(255 * red), round(255 * green), round(255 * blue)


def _legend_positions(legend: Sequence[tuple[str, Colour]]) -> list[tuple[int, int]]:
  """Returns (x in pixels, line) of each entry."""
  positions, x, line = [], GAP, 0
  for text, _ in legend:
    width = LINE + round(FONT.getlength(text)) + 2 * GAP
    if x + width > BAR_WIDTH:
      x, line = GAP, line + 1
    positions.append((x, line))
    x += width
  return positions


def _legend_lines(legend: Sequence[tuple[str, Colour]]) -> int:
  return _legend_positions(legend)[-1][1] + 1


def _draw_legend(draw: ImageDraw.ImageDraw, legend: Sequence[tuple[str, Colour]], top: int) -> None:
  for (text, colour), (x, line) in zip(legend, _legend_positions(legend), strict=True):
    y = top + line * LINE
    draw.rectangle((x, y + 3, x + 11, y + 14), fill=colour)
    draw.text((x + LINE, y), text, fill="black", font=FONT)


def _fit(pixels: Image8) -> Image.Image:
  """Scales a picture to at most CELL wide and high. A small one is enlarged without smoothing."""
  height, width = pixels.shape[:2]
  scale = CELL / max(height, width)
  resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
  size = (max(round(width * scale), 1), max(round(height * scale), 1))
  return Image.fromarray(pixels).resize(size, resampling)


def _cut(text: str) -> str:
  """Returns as much of a line as fits a cell."""
  if FONT.getlength(text) <= CELL:
    return text
  while text and FONT.getlength(text + "…") > CELL:
    text = text[:-1]
  return text + "…"


def _save(image: Image.Image, path: epath.Path) -> None:
  buffer = io.BytesIO()
  image.save(buffer, format="png")
  with disk_errors(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
