"""Tables at real sizes that need no weights: positions, crops, sinusoids, timesteps, guidance."""

import math
import types

import torch
from diffusers import CogVideoXDDIMScheduler
from diffusers.models.embeddings import get_3d_sincos_pos_embed, get_timestep_embedding
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor

from .folder import GoldensFolder
from .models import rotary_tables
from .schedules import PUBLISHED

# Pixel height, pixel width and latent frames of clips, for the rotations of 1.0 and of 1.5.
CLIPS_10 = (
  (480, 720, 13),
  (720, 480, 13),
  (768, 1360, 13),
  (512, 512, 9),
  (256, 256, 3),
  (544, 960, 7),
  (240, 368, 5),
  (720, 720, 1),
  (496, 720, 2),
)
CLIPS_15 = ((768, 1360, 22), (1360, 768, 22), (768, 768, 42), (480, 720, 3), (240, 368, 1))
HEAD_DIM = 64
# Channels that each axis rotates.
TIME, HEIGHT, WIDTH = slice(0, 16), slice(16, 40), slice(40, 64)

CROPPED_GRIDS = (
  (1, 2, 3, 5, 6, 9, 15, 16, 24, 30, 31, 32, 45, 48, 85),  # Rows.
  (1, 2, 3, 5, 7, 12, 23, 30, 32, 45, 46, 48, 60, 85),  # Columns.
)
CROPPED_TO = ((45, 30), (6, 4), (85, 48), (7, 11))  # Columns and rows.

# For the counts after 1000, diffusers gives one timestep too many, -1, because of a float range.
STEP_COUNTS = (
  *(1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 16, 20, 24, 25, 28, 30, 32, 40, 48, 50, 51, 60, 64, 100),
  *(250, 1000, 61, 103, 121, 122, 201),
)
GUIDANCE = 6.0


def make(folder: GoldensFolder) -> None:
  rotary(folder)
  crops(folder)
  sincos(folder)
  sinusoids(folder)
  timesteps_and_guidance(folder)


def rotary(folder: GoldensFolder) -> None:
  tensors, entries = {}, []
  for version, patch_frames, side, clips in (("10", None, 0, CLIPS_10), ("15", 2, 300, CLIPS_15)):
    config = types.SimpleNamespace(
      patch_size=2,
      patch_size_t=patch_frames,
      sample_height=side or 60,
      sample_width=side or 90,
      attention_head_dim=HEAD_DIM,
    )
    for height, width, frames in clips:
      key = f"tab.rope{version}_{height}x{width}x{frames}"
      grid = -(-frames // (patch_frames or 1)), height // 16, width // 16
      both = rotary_tables(config, (frames, height // 8, width // 8))
      for name, table in zip(("cos", "sin"), both, strict=True):
        for axis, edge in along_axes(table.reshape(*grid, HEAD_DIM)).items():
          tensors[f"{key}.{name}_{axis}"] = edge
      entries.append({"key": key, "grid": grid})
  folder.add_case(
    "rope_tables",
    "table",
    tensors,
    {
      "tab.rope": "HEIGHTxWIDTHxFRAMES.(cos|sin)_(t|h|w): what a table has along one axis, in that "
      "axis's channels (16, 24, 24)"
    },
    call={"base10": [30, 45], "base15": [150, 150], "head_dim": HEAD_DIM},
    values={"rope": entries},
  )


def along_axes(table: Tensor) -> dict[str, Tensor]:
  """The edges of a separable table [T, H, W, 64], which say all of it."""
  edges = {"t": table[:, 0, 0, TIME], "h": table[0, :, 0, HEIGHT], "w": table[0, 0, :, WIDTH]}
  whole = [
    edges["t"][:, None, None].expand(*table.shape[:3], -1),
    edges["h"][None, :, None].expand(*table.shape[:3], -1),
    edges["w"][None, None, :].expand(*table.shape[:3], -1),
  ]
  if not torch.equal(torch.cat(whole, dim=-1), table):
    raise ValueError("a table of rotations is not separable")
  return edges


def crops(folder: GoldensFolder) -> None:
  rows = []
  for to_columns, to_rows in CROPPED_TO:
    for height in CROPPED_GRIDS[0]:
      for width in CROPPED_GRIDS[1]:
        start, stop = get_resize_crop_region_for_grid((height, width), to_columns, to_rows)
        rows.append([height, width, to_columns, to_rows, *start, *stop])
  about = "rows, columns, columns and rows cropped to; then top, left, bottom, right"
  folder.add_case("crop_regions", "table", {"tab.crops": torch.tensor(rows)}, {"tab.crops": about})


def sincos(folder: GoldensFolder) -> None:
  rows, columns, frames = 30, 45, 13
  tensors = {}
  for width in (1920, folder.sizes.heads * folder.sizes.head_dim):
    space, time = (
      get_3d_sincos_pos_embed(width, size, length, 1.875, 1.0, output_type="pt")
      for size, length in (((columns, rows), 1), ((2, 2), frames))
    )
    space = space[0].reshape(rows, columns, width).float()
    of_time, of_width = width // 4, width // 8 * 3
    tensors[f"tab.sincos{width}.t"] = time[:, 0, :of_time].float()
    tensors[f"tab.sincos{width}.w"] = space[0, :, of_time : of_time + of_width]
    tensors[f"tab.sincos{width}.h"] = space[:, 0, of_time + of_width :]
  folder.add_case(
    "sincos_tables",
    "table",
    tensors,
    {"tab.sincos": "WIDTH.(t|h|w): what the table has along one axis, in that axis's channels"},
    call={"grid_w": columns, "grid_h": rows, "frames": frames},
  )


def sinusoids(folder: GoldensFolder) -> None:
  timesteps = torch.tensor([0.0, 1.0, 2.0, 19.0, 249.0, 499.5, 999.0])
  tensors = {"in.timesteps": timesteps}
  for width in (512, 1920, 3072):
    tensors[f"out.dim{width}"] = get_timestep_embedding(
      timesteps, width, flip_sin_to_cos=True, downscale_freq_shift=0
    )
  about = {"in.timesteps": "any reals", "out.dim": "WIDTH: cosines, then sines"}
  folder.add_case("timestep_sinusoids", "table", tensors, about)


def timesteps_and_guidance(folder: GoldensFolder) -> None:
  scheduler = CogVideoXDDIMScheduler(**PUBLISHED, snr_shift_scale=1.0)
  tensors = {}
  for count in STEP_COUNTS:
    scheduler.set_timesteps(count)
    # As CogVideoXPipeline.__call__ computes it, of the timestep and not of the step.
    scales = [
      1 + GUIDANCE * ((1 - math.cos(math.pi * ((count - t) / count) ** 5.0)) / 2)
      for t in scheduler.timesteps.tolist()
    ]
    tensors[f"tab.timesteps.{count}"] = scheduler.timesteps
    tensors[f"tab.dynamic_cfg.{count}"] = torch.tensor(scales, dtype=torch.float64)
  folder.add_case(
    "timesteps_and_dynamic_cfg",
    "table",
    tensors,
    {
      "tab.timesteps": "STEPS: what set_timesteps(STEPS) gives",
      "tab.dynamic_cfg": "STEPS: the guidance scale of each timestep, in float64",
    },
    call={"guidance_scale": GUIDANCE},
  )
