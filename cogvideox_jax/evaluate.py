"""Scores VAEs on clips: `python -m cogvideox_jax.evaluate vae --model=tiny --clips=FOLDER`.

Encodes and decodes the same clips with each --model, and prints for each one PSNR, SSIM, LPIPS,
FVD and flicker. --output=FOLDER also writes table.md and table.png. With --json the last lines are
one JSON object for each model. LPIPS and FVD need the extra `metrics`; without it they are null.
"""

import json
import os
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from cogvideox_jax import command, path_flags, paths
from cogvideox_jax.conversion.folder import SHIPPED
from cogvideox_jax.data import measured_clips
from cogvideox_jax.data.decoding import Decoders, File
from cogvideox_jax.data.manifest import read_manifest
from cogvideox_jax.data.media import VideoError
from cogvideox_jax.data.video import Window, probe
from cogvideox_jax.devices import open_devices
from cogvideox_jax.errors import UserError
from cogvideox_jax.evaluation import table_files, vae_table
from cogvideox_jax.evaluation.clip_scores import Judges
from cogvideox_jax.evaluation.reconstruction import VAEModel, check_size, open_vae
from cogvideox_jax.evaluation.vae_table import Row, Setting
from cogvideox_jax.models.lpips import BACKBONES

MODEL = flags.DEFINE_multi_string(
  "model",
  None,
  "A model folder, a shipped name (tiny), a VAE's folder, or a workdir of train_vae. Give the flag "
  "once for each VAE.",
  required=True,
)
CLIPS = path_flags.define(
  "clips", None, "Folder of clips, or a manifest, as for encode.", required=True
)
OUTPUT = path_flags.define("output", "", "Folder for table.md and table.png.", may_be_empty=True)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object a model as the last lines.")
NUM_FRAMES = flags.DEFINE_integer("num_frames", 17, "Frames of a clip.", lower_bound=1)
HEIGHT = flags.DEFINE_integer(
  "height", 0, "Height in pixels; 0: 256, or less if the first clip is smaller.", lower_bound=0
)
WIDTH = flags.DEFINE_integer(
  "width", 0, "Width in pixels; 0: as the height's default.", lower_bound=0
)
FPS = flags.DEFINE_float(
  "fps", 8.0, "Frames per second that clips are brought to.", lower_bound=0.1
)
WINDOWS = flags.DEFINE_enum(
  "windows", "first", ["first", "all"], "Take the first clip of a file, or all that it holds."
)
LPIPS = flags.DEFINE_enum(
  "lpips", "alexnet", list(BACKBONES), "Network of LPIPS. VAEs are trained with vgg16."
)
FVD = flags.DEFINE_bool("fvd", True, "Compute FVD, which takes most of the time on a CPU.")
BIASED = flags.DEFINE_bool(
  "biased", False, "FVD with biased covariances, as cd-fvd; else unbiased, as Google's code."
)
WORKERS = flags.DEFINE_integer(
  "workers", min(os.cpu_count() or 1, 8), "Processes that decode files.", lower_bound=1
)
DEFAULT_SIDE = 256  # Pixels, as in table 2 of the paper.
BATCH_CLIPS = 4


def main(what: str) -> None:
  if what != "vae":
    raise UserError(f"There is nothing to evaluate by the name {what!r}.\nGive: vae")
  open_devices()
  vaes = [open_vae(as_path(name))._replace(name=name) for name in dict.fromkeys(MODEL.value)]
  height, width = size_of(vaes)
  for vae in vaes:
    check_size(vae, NUM_FRAMES.value, height, width)
  judges = Judges(LPIPS.value, fvd_frames=NUM_FRAMES.value if FVD.value else None)
  windows = "first frames" if WINDOWS.value == "first" else "windows"
  setting = Setting(NUM_FRAMES.value, height, width, FPS.value, windows, BIASED.value)
  with Decoders(WORKERS.value) as decoders:
    rows = vae_table.compare(vaes, batches(setting, decoders), judges, setting)
  lines = said(rows, setting)
  print(table_files.markdown(rows, lines))
  if OUTPUT.value:
    table_files.write(epath.Path(OUTPUT.value), rows, lines)
    print(f"Wrote {OUTPUT.value}/table.md and table.png.")
  if JSON.value:
    for row in rows:
      print(json.dumps(row, allow_nan=False))


def as_path(name: str) -> str:
  """The absolute path of a model, or its shipped name."""
  return name if name in SHIPPED else paths.absolute(name)


def size_of(vaes: Sequence[VAEModel]) -> tuple[int, int]:
  """Returns height and width: the flags, or a square that the first clip fills."""
  if HEIGHT.value and WIDTH.value:
    return HEIGHT.value, WIDTH.value
  if HEIGHT.value or WIDTH.value:
    raise UserError("Give --height and --width, or neither.")
  multiple = int(np.lcm.reduce([vae.config.spatial_compression for vae in vaes]))
  for item in read_manifest(CLIPS.value).items:
    try:
      info = probe(item.file)
    except VideoError:
      continue  # `measure` says why.
    side = min(DEFAULT_SIDE, info.height, info.width) // multiple * multiple
    if side:
      return side, side
  raise UserError(f"No clip of {CLIPS.value} can be used: none has {multiple} pixels a side.")


def batches(setting: Setting, decoders: Decoders) -> Iterator[UInt8[np.ndarray, "b F H W 3"]]:
  """Decodes the clips, in batches of up to BATCH_CLIPS."""
  size = setting.height, setting.width
  clips = measured_clips.measure(CLIPS.value, [size], [setting.frames], setting.fps, decoders)
  starts: dict[int, list[int]] = {}
  for bucket in clips.by_bucket.values():
    for file, start in zip(bucket.files.tolist(), bucket.starts.tolist(), strict=True):
      starts.setdefault(file, []).append(start)
  if WINDOWS.value == "first":
    starts = {file: found[:1] for file, found in starts.items()}
  files = [
    File(clips.files[file].file, setting.fps, [Window(at, setting.frames, *size) for at in found])
    for file, found in starts.items()
  ]
  waiting = []
  decoded = tqdm(decoders.decode(files), "Scoring clips", len(files), unit="file")
  for file, pieces in zip(files, decoded, strict=True):
    try:
      for piece in pieces:
        waiting.append(piece.frames)
        if len(waiting) == BATCH_CLIPS:
          yield np.stack(waiting)
          waiting = []
    except VideoError as error:
      tqdm.write(f"{file.path}: {error}; it is left out")
  if waiting:
    yield np.stack(waiting)


def said(rows: Sequence[Row], setting: Setting) -> list[str]:
  """Returns what must be known beside the figures."""
  first = rows[0]
  clips = f"{first['clips']} clips of {first['frames']} frames of {first['size']}"
  lines = [
    f"{clips} at {setting.fps:g} fps, {setting.windows}.",
    "The means of the latents are decoded, and frames are rounded to bytes.",
    f"SSIM: gaussian 11 taps, sigma 1.5, valid region. LPIPS: {LPIPS.value}, mean over frames.",
    "Flicker: mean difference of neighbouring frames on 0..255, not the paper's unpublished scale.",
  ]
  if first["fvd_flavour"]:
    lines.append(f"FVD: {first['fvd_flavour']}.")
  return lines + [note[0].upper() + note[1:] for note in first["notes"]]


if __name__ == "__main__":
  command.run(main, "vae")
