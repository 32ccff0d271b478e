"""Takes a video through a VAE and back, and scores the result.

python -m cogvideox_jax.reconstruct --model=tiny --input=clip.mp4 --output=round.mp4

Prints PSNR, SSIM, LPIPS and the flicker of both videos; with --json as one object, the last line.
The figures are of the frames before they are compressed as mp4. LPIPS needs the extra `metrics`.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
from absl import flags
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from cogvideox_jax import command, path_flags
from cogvideox_jax.conversion.folder import SHIPPED
from cogvideox_jax.data.files import disk_errors
from cogvideox_jax.data.media import VideoError
from cogvideox_jax.data.mp4 import write_mp4
from cogvideox_jax.data.video import Window, probe, read_windows
from cogvideox_jax.devices import open_devices
from cogvideox_jax.errors import UserError
from cogvideox_jax.evaluation import clip_scores, reconstruction
from cogvideox_jax.evaluation.clip_scores import ClipTally, Judges
from cogvideox_jax.evaluation.reconstruction import VAEModel
from cogvideox_jax.models.lpips import BACKBONES

MODEL = path_flags.define(
  "model",
  None,
  "A model folder, a shipped name (tiny), a VAE's folder, or a workdir of train_vae.",
  required=True,
  names=SHIPPED,
)
INPUT = path_flags.define("input", None, "The video or image file to restore.", required=True)
OUTPUT = path_flags.define("output", None, "The mp4 file to write.", required=True)
NUM_FRAMES = flags.DEFINE_integer(
  "num_frames", 0, "Frames to take; 0: as many as the file has and the VAE gives back.", 0
)
HEIGHT = flags.DEFINE_integer("height", 0, "Height in pixels; 0: the file's, cropped to fit.", 0)
WIDTH = flags.DEFINE_integer("width", 0, "Width in pixels; 0: the file's, cropped to fit.", 0)
FPS = flags.DEFINE_float("fps", 0.0, "Frames per second; 0: the file's.", 0.0)
LPIPS = flags.DEFINE_enum("lpips", "alexnet", list(BACKBONES), "Network of LPIPS.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object as the last line.")


def main() -> None:
  if not OUTPUT.value.endswith(".mp4"):
    raise UserError(f"--output={OUTPUT.value}: videos are written as mp4; end the name in .mp4.")
  open_devices()
  vae = reconstruction.open_vae(MODEL.value)._replace(name=path_flags.as_given(MODEL))
  try:
    fps, num_frames, height, width = shape(vae)
    reconstruction.check_size(vae, num_frames, height, width)
    judges = Judges(LPIPS.value, (height, width), fvd_frames=None)
    tally = ClipTally(judges)
    source = read_windows(INPUT.value, [Window(0, num_frames, height, width)], fps=fps)
    restored = restore(vae, (frame for _, frame in source), num_frames, tally)
    with disk_errors(OUTPUT.value):
      epath.Path(OUTPUT.value).parent.mkdir(parents=True, exist_ok=True)
    write_mp4(OUTPUT.value, restored, fps)
  except VideoError as error:
    raise UserError(f"{INPUT.value}: {error}") from error
  fields = clip_scores.as_fields(tally.scores())
  for note in judges.notes:
    print(note)
  for name, value in fields.items():
    print(f"{name:18} {'–' if value is None else format(value, '.4f')}")
  print(f"Wrote {OUTPUT.value}: {num_frames} frames of {width}x{height} at {fps:g} fps.")
  if JSON.value:
    facts = {"model": vae.name, "frames": num_frames, "size": f"{height}x{width}", "fps": fps}
    print(json.dumps({**facts, **fields, "notes": judges.notes}, allow_nan=False))


def restore(
  vae: VAEModel,
  source: Iterable[UInt8[np.ndarray, "H W 3"]],
  num_frames: int,
  tally: ClipTally,
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
  """Yields the restored frames, and scores them. A few chunks of a video are in memory."""
  waiting: deque[np.ndarray] = deque()  # Frames of the source that were not given back yet.

  def read() -> Iterator[np.ndarray]:
    for frame in source:
      waiting.append(frame)
      yield frame[None, None]

  with tqdm(total=num_frames, desc="Restoring", unit="frame") as progress:
    for (chunk,) in reconstruction.reconstruct_stream(vae, read(), num_frames):
      tally.add(np.stack([waiting.popleft() for _ in chunk]), chunk)
      yield from chunk
      progress.update(len(chunk))


def shape(vae: VAEModel) -> tuple[float, int, int, int]:
  """Returns frames per second, frames, height and width: the flags, or what the file has."""
  info = probe(INPUT.value)
  fps = FPS.value or info.fps or 8.0  # An image has no rate.
  side = vae.config.spatial_compression
  frames = NUM_FRAMES.value or reconstruction.most_frames(vae, info.frames_at(fps))
  height = HEIGHT.value or info.height // side * side
  width = WIDTH.value or info.width // side * side
  if not height or not width:
    raise VideoError(f"{info.height}x{info.width} pixels; the VAE takes at least {side} a side")
  return fps, frames, height, width


if __name__ == "__main__":
  command.run(main)
