"""What people see of videos on one page."""

import numpy as np
from PIL import Image
from test_video import grey_steps

from cogvideox_jax.data.contact_sheet import contact_sheet


def test_a_contact_sheet_shows_each_video_from_first_to_last(tmp_path):
  videos = [grey_steps(17), grey_steps(1, 600, 900), grey_steps(3, 64, 64)]
  captions = ["a short one", "a caption of many words " * 20, "日本語 и кириллица"]
  contact_sheet(videos, captions, tmp_path / "a.png")
  sheet = np.asarray(Image.open(tmp_path / "a.png"))
  assert sheet.shape[1] >= 8 * 160 and sheet.shape[0] >= 128 + 128 + 128
  levels = set(np.unique(sheet[..., 0]))
  assert {5 * index for index in (0, 2, 5, 7, 9, 11, 14, 16)} <= levels
