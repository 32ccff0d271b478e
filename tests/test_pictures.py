"""The pictures of a dataset show what is in it."""

import numpy as np
from drawn_dataset import make_dataset, make_rows
from etils import epath
from PIL import Image

from cogvideox_jax.data import pictures
from cogvideox_jax.data.pictures import Tile


def test_bars_are_as_long_as_clips_have_tokens(tmp_path):
  rows = make_rows(make_dataset(tmp_path, range(30)))
  path = epath.Path(tmp_path) / "packing.png"
  pictures.packing_picture(rows, 4, "rows", path)
  image = np.asarray(Image.open(path))
  for line in range(4):
    y = image.shape[0] - pictures.GAP - (4 - line) * (pictures.BAR_HEIGHT + 2) + 4
    bar = image[y, pictures.GAP : pictures.GAP + pictures.BAR_WIDTH]
    per_token = pictures.BAR_WIDTH / rows.row_tokens
    for colour, tokens in (
      (pictures.TEXT_COLOUR, 8 * len(rows[line].clips)),
      (pictures.PADDING_COLOUR, rows.row_tokens - rows.lengths[rows[line].clips].sum()),
    ):
      pixels = (bar == colour).all(axis=-1).sum()
      assert abs(pixels - tokens * per_token) <= len(rows[line].clips) + 1


def test_a_sheet_shows_every_clip_whatever_its_size_and_caption(tmp_path):
  colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (200, 200, 10), (10, 200, 200)] * 2
  sizes = [(8, 8), (8, 24), (600, 20), (1, 1), (300, 500)] * 2
  labels = [["a"], [], ["日本語 🎈", "é" * 300, "c"], ["\x00"], ["x", "y", "z", "too much"]] * 2
  tiles = [
    Tile(np.full((*size, 3), colour, np.uint8), label)
    for size, colour, label in zip(sizes, colours, labels, strict=True)
  ]
  pictures.clip_sheet(tiles, "title", epath.Path(tmp_path) / "new" / "sheet.png")
  image = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
  for colour in set(colours):
    assert (image == colour).all(axis=-1).any()


def test_false_colours_keep_apart_what_differs():
  rng = np.random.default_rng(0)
  halves = rng.normal(size=(2, 16)).astype(np.float32)
  latents = np.repeat(halves, 3, axis=0)[:, None] + 0.01 * rng.normal(size=(6, 8, 16))
  (image,) = pictures.false_colours([latents.astype(np.float16)])
  means = image.reshape(2, -1, 3).mean(axis=1)
  assert np.abs(means[0] - means[1]).max() > 100
  alike = pictures.false_colours([np.ones((2, 3, 16), np.float16)] * 2)
  assert [one.shape for one in alike] == [(2, 3, 3)] * 2
