"""Scores VAEs on clips: `python -m cogvideox_jax.evaluate vae --model=tiny --clips=FOLDER`.

Encodes and decodes the same clips with each --model, and prints for each one PSNR, SSIM, LPIPS,
FVD and flicker. --output=FOLDER also writes table.md and table.png. With --json the last lines are
one JSON object for each model. LPIPS and FVD need the extra `metrics`; without it they are null.

python -m cogvideox_jax.evaluate vae --ablation=configs/table1.py --workdir=runs/table1

Trains the variants of an ablation with several seeds, as far as that is not done yet, and scores
them on the clips that their trainings hold out. Writes table.md and table.png into the workdir:
means and standard deviations over seeds, and which claims they resolve.
"""

import json
import os
from collections.abc import Sequence

import numpy as np
from absl import flags
from etils import epath

from cogvideox_jax import command, path_flags, paths
from cogvideox_jax.config.ablation_schema import VAEAblationConfig
from cogvideox_jax.conversion.folder import SHIPPED
from cogvideox_jax.data import measured_clips
from cogvideox_jax.data.buckets import Bucket
from cogvideox_jax.data.decoding import Decoders
from cogvideox_jax.data.manifest import read_manifest
from cogvideox_jax.data.media import VideoError
from cogvideox_jax.data.video import probe
from cogvideox_jax.devices import open_devices
from cogvideox_jax.errors import UserError
from cogvideox_jax.evaluation import scored_clips, table_files, vae_table
from cogvideox_jax.evaluation.clip_scores import Judges
from cogvideox_jax.evaluation.reconstruction import VAEModel, check_size, open_vae
from cogvideox_jax.evaluation.vae_table import Row, Setting
from cogvideox_jax.models.lpips import BACKBONES

ABLATION = command.config_flag(
  VAEAblationConfig, required=False, name="ablation", what="Config file of an ablation"
)
WORKDIR = path_flags.define("workdir", None, "Folder of the ablation's runs and its table.")
MODEL = flags.DEFINE_multi_string(
  "model",
  None,
  "A model folder, a shipped name (tiny), a VAE's folder, or a workdir of train_vae. Give the flag "
  "once for each VAE.",
)
CLIPS = path_flags.define("clips", None, "Folder of clips, or a manifest, as for encode.")
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
_OF_MODELS = ("model", "clips", "output", "num_frames", "height", "width", "fps")


def main(what: str) -> int:
  if what != "vae":
    raise UserError(f"There is nothing to evaluate by the name {what!r}.\nGive: vae")
  if ABLATION.given:
    return evaluate_ablation(ABLATION.value)
  check_flags(wanted=("model", "clips"), unwanted=("workdir",), unless="--ablation")
  evaluate_models(MODEL.value or [])
  return 0


def check_flags(*, wanted: Sequence[str], unwanted: Sequence[str], unless: str) -> None:
  """Raises UserError for a flag that is missing, or that belongs to the command's other use."""
  for name in wanted:
    if not flags.FLAGS[name].present:
      raise UserError(f"Missing flag: --{name}=...\nSee --help for the flags.")
  for name in unwanted:
    if flags.FLAGS[name].present:
      raise UserError(f"--{name} is not taken with{'out' if name == 'workdir' else ''} {unless}.")


def evaluate_ablation(config: VAEAblationConfig) -> int:
  """Trains what is missing of an ablation, and writes its table; returns the exit code."""
  from cogvideox_jax.training import vae_ablation

  check_flags(wanted=("workdir",), unwanted=_OF_MODELS, unless="--ablation")
  vae_ablation.check(config)
  open_devices()
  frames, *size = vae_ablation.bucket_of(config)
  judges = Judges(LPIPS.value, size, fvd_frames=frames if FVD.value else None)
  workdir = epath.Path(WORKDIR.value)
  if exit_code := vae_ablation.train(config, workdir):
    return exit_code
  with Decoders(WORKERS.value) as decoders:
    rows, verdicts = vae_ablation.score(
      config,
      workdir,
      judges,
      decoders,
      every_window=WINDOWS.value == "all",
      biased=BIASED.value,
    )
  fps = config.training.data.fps
  lines = [
    "Means and standard deviations over seeds, on files that no run was trained on.",
    *said(rows, fps, "windows" if WINDOWS.value == "all" else "first frames"),
    *(f"{clips}: {verdict}." for clips, verdict in verdicts),
  ]
  show(rows, lines, workdir)
  return 0


def evaluate_models(names: Sequence[str]) -> None:
  """Scores VAEs on --clips."""
  open_devices()
  vaes = [open_vae(as_path(name))._replace(name=name) for name in dict.fromkeys(names)]
  height, width = size_of(vaes)
  for vae in vaes:
    check_size(vae, NUM_FRAMES.value, height, width)
  judges = Judges(LPIPS.value, (height, width), fvd_frames=NUM_FRAMES.value if FVD.value else None)
  windows = "first frames" if WINDOWS.value == "first" else "windows"
  setting = Setting(NUM_FRAMES.value, height, width, FPS.value, windows, BIASED.value)
  bucket = Bucket(NUM_FRAMES.value, height, width)
  with Decoders(WORKERS.value) as decoders:
    clips = measured_clips.measure(
      CLIPS.value, [(height, width)], [bucket.num_frames], setting.fps, decoders
    )
    batches = scored_clips.decode(clips, bucket, decoders, every_window=WINDOWS.value == "all")
    rows = vae_table.compare(vaes, batches, judges, setting)
  lines = said(rows, setting.fps, windows)
  show(rows, lines, epath.Path(OUTPUT.value) if OUTPUT.value else None)


def show(rows: Sequence[Row], lines: Sequence[str], folder: epath.Path | None) -> None:
  """Prints a table, writes it into a folder if there is one, and prints the rows as JSON."""
  print(table_files.markdown(rows, lines))
  if folder:
    table_files.write(folder, rows, lines)
    print(f"Wrote {folder}/table.md and table.png.")
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


def said(rows: Sequence[Row], fps: float, windows: str) -> list[str]:
  """Returns what must be known beside the figures."""
  first = rows[0]
  clips = f"{first['clips']} clips of {first['frames']} frames of {first['size']}"
  lines = [
    f"{clips} at {fps:g} fps, {windows}.",
    "The means of the latents are decoded, and frames are rounded to bytes.",
    f"SSIM: gaussian 11 taps, sigma 1.5, valid region. LPIPS: {LPIPS.value}, mean over frames.",
    "Flicker: mean difference of neighbouring frames on 0..255, not the paper's unpublished scale.",
  ]
  if first["fvd_flavour"]:
    lines.append(f"FVD: {first['fvd_flavour']}.")
  return lines + [note[0].upper() + note[1:] for note in first["notes"]]


if __name__ == "__main__":
  command.run(main, "vae")
