"""Takes a video through a VAE and back, and scores the result.

python -m cogvideox_jax.reconstruct --model=tiny --input=clip.mp4 --output=round.mp4

Prints PSNR, SSIM, LPIPS and the flicker of both videos; with --json as one object, the last line.
The figures are of the frames before they are compressed as mp4. LPIPS needs the extra `metrics`.
"""

import json

from absl import flags
from etils import epath

from cogvideox_jax import command, path_flags
from cogvideox_jax.conversion.folder import SHIPPED
from cogvideox_jax.data.files import disk_errors
from cogvideox_jax.data.media import VideoError
from cogvideox_jax.data.mp4 import write_mp4
from cogvideox_jax.data.video import probe, read
from cogvideox_jax.devices import open_devices
from cogvideox_jax.errors import UserError
from cogvideox_jax.evaluation import clip_scores, reconstruction
from cogvideox_jax.evaluation.clip_scores import Judges
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
    source = read(INPUT.value, fps=fps, num_frames=num_frames, height=height, width=width)
  except VideoError as error:
    raise UserError(f"{INPUT.value}: {error}") from error
  judges = Judges(LPIPS.value, (height, width), fvd_frames=None)
  restored = reconstruction.reconstruct(vae, source[None])[0]
  with disk_errors(OUTPUT.value):
    epath.Path(OUTPUT.value).parent.mkdir(parents=True, exist_ok=True)
    write_mp4(OUTPUT.value, restored, fps)
  fields = clip_scores.as_fields(judges.score(source, restored))
  for note in judges.notes:
    print(note)
  for name, value in fields.items():
    print(f"{name:18} {'–' if value is None else format(value, '.4f')}")
  print(f"Wrote {OUTPUT.value}: {num_frames} frames of {width}x{height} at {fps:g} fps.")
  if JSON.value:
    facts = {"model": vae.name, "frames": num_frames, "size": f"{height}x{width}", "fps": fps}
    print(json.dumps({**facts, **fields, "notes": judges.notes}, allow_nan=False))


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
