"""Text to video: `python -m cogvideox_jax.sample --model=tiny --prompt="..." --output=out.mp4`.

With --image=FILE the video begins with an image; this needs a model that was trained for it. With
--video=FILE the prompt says how to change a video.

Defaults come from the model's folder, or from its training. The comment of the mp4 holds, as JSON,
all arguments that the video was made with.
"""

import errno
import os
import tempfile
from typing import Any

from absl import flags
from etils import epath

from cogvideox_jax import __version__, command, model_flags, path_flags, paths
from cogvideox_jax.conversion.folder import SHIPPED
from cogvideox_jax.data.media import VideoError
from cogvideox_jax.data.mp4 import write_mp4
from cogvideox_jax.data.video import read
from cogvideox_jax.devices import open_devices
from cogvideox_jax.diffusion.solvers import SOLVERS
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference.arguments import CallArguments
from cogvideox_jax.inference.image_to_video import ImageToVideo
from cogvideox_jax.inference.pipeline import Pipeline
from cogvideox_jax.inference.progress import Progress
from cogvideox_jax.inference.request import SampledModel, make_request
from cogvideox_jax.inference.size import default_size
from cogvideox_jax.inference.video_to_video import VideoToVideo
from cogvideox_jax.model_flags import LORA, LORA_ALPHA, LORA_WEIGHT, WEIGHTS
from cogvideox_jax.training import workdir

MODEL = path_flags.define(
  "model",
  None,
  "A model folder, a shipped name (tiny), or a training workdir.",
  required=True,
  names=SHIPPED,
)
PROMPT = flags.DEFINE_string("prompt", None, "What the video shows.", required=True)
OUTPUT = path_flags.define("output", None, "The mp4 file to write.", required=True)
IMAGE = path_flags.define(
  "image", None, "Image file that the video begins with.", may_be_empty=True
)
VIDEO = path_flags.define(
  "video", None, "Video file to change as the prompt says.", may_be_empty=True
)
STRENGTH = flags.DEFINE_float(
  "strength", 0.8, "How much to change --video; at 1 nothing of it remains.", 0.0, 1.0
)
TILING = flags.DEFINE_bool("tiling", False, "Decode in tiles: less memory, more time.")
OFFLOAD = flags.DEFINE_bool(
  "offload",
  False,
  "Keep components that are not in use in the host's memory: less device memory, the same video.",
)
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", None, "What the video should not show.")
HEIGHT = flags.DEFINE_integer("height", None, "Height in pixels; by default the model's.")
WIDTH = flags.DEFINE_integer("width", None, "Width in pixels; by default the model's.")
NUM_FRAMES = flags.DEFINE_integer("num_frames", None, "Frames, 4k + 1; by default the model's.")
FPS = flags.DEFINE_float(
  "fps", None, "Frames per second of the file; by default the model's.", lower_bound=0.1
)
STEPS = flags.DEFINE_integer(
  "steps", None, "Denoising steps; by default the model's.", lower_bound=1
)
GUIDANCE_SCALE = flags.DEFINE_float(
  "guidance_scale",
  None,
  "How strongly to follow the prompt; 1 is no guidance. By default the model's.",
)
DYNAMIC_CFG = flags.DEFINE_bool(
  "dynamic_cfg", False, "Change the guidance scale with the timestep."
)
SOLVER = flags.DEFINE_enum(
  "solver", None, list(SOLVERS), "Solver of the denoising steps; by default the model's."
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise: the same seed gives the same video.")
model_flags.declare()


def main() -> None:
  output = epath.Path(OUTPUT.value)
  check_output(output)
  open_devices()
  check_files()
  lora = model_flags.read_lora()
  model = workdir.describe(MODEL.value)
  arguments = call_arguments(model)
  check_request(model, arguments)
  fps = model.settings.fps if FPS.value is None else FPS.value
  given = read_given(arguments, fps)
  progress = Progress()
  with progress.phase("load") as bar:
    pipe = workdir.load(
      MODEL.value,
      kind=kind(),
      weights=WEIGHTS.value,
      progress=progress,
      offload=OFFLOAD.value,
    )
    if lora:
      pipe.add_lora(lora, "default", LORA_WEIGHT.value)
    pipe.enable_tiling(TILING.value)
    bar.update()
  asked = len(given["video"]) if "video" in given else arguments["num_frames"]
  frames = pipe(**{**arguments, **given}, output_type="uint8").frames[0]
  if len(frames) > asked:
    print(f"The VAE decodes {len(frames)} frames; the first {asked}, as asked for, are written.")
    frames = frames[:asked]
  with progress.phase("write") as bar:
    made_with = {"fps": fps, "version": __version__, **arguments, **files_given()}
    made_with |= lora_arguments()
    write_mp4(output, frames, fps, metadata=made_with)
    bar.update()
  print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in progress.seconds.items()))
  shape = f"{len(frames)} frames of {frames.shape[2]}x{frames.shape[1]} at {fps:g} fps"
  print(f"Wrote {output}: {shape}, seed {SEED.value}.")


def lora_arguments() -> dict[str, Any]:
  """The flags of the LoRA, if there is one."""
  alpha = {} if LORA_ALPHA.value is None else {"lora_alpha": LORA_ALPHA.value}
  given = path_flags.as_given(LORA)
  return {"lora": given, "lora_weight": LORA_WEIGHT.value, **alpha} if LORA.value else {}


def check_files() -> None:
  """Raises UserError for a file that is not there, before the model is read."""
  for flag in (IMAGE, VIDEO, LORA):
    if flag.value and not epath.Path(flag.value).exists():
      raise UserError(f"--{flag.name}={path_flags.as_given(flag)}: there is no {flag.value}.")


def check_request(model: SampledModel, arguments: dict[str, Any]) -> None:
  """Raises UserError for arguments that the model cannot follow, before its weights are read."""
  kind().check_channels(model.transformer)
  others = {name: value for name, value in arguments.items() if name != "strength"}
  num_frames = others.pop("num_frames")
  make_request(model, CallArguments(**others), None if VIDEO.value else num_frames)


def files_given() -> dict[str, Any]:
  """The flags that name files, as they were given, for the comment of the mp4."""
  return {flag.name: path_flags.as_given(flag) for flag in (MODEL, IMAGE, VIDEO) if flag.value}


def kind() -> type[Pipeline]:
  """The class of pipeline that the given files need."""
  if IMAGE.value and VIDEO.value:
    raise UserError("Give --image or --video, not both.")
  if IMAGE.value:
    return ImageToVideo
  return VideoToVideo if VIDEO.value else Pipeline


def read_given(arguments: dict[str, Any], fps: float) -> dict[str, Any]:
  """Reads --image or --video, cropped to the size asked for, as arguments of the call.

  Removes `num_frames` from `arguments` if there is a video: so many frames of it are read, and the
  call takes their number from the video.
  """
  path = IMAGE.value or VIDEO.value
  if not path:
    return {}
  size = {"height": arguments["height"], "width": arguments["width"]}
  num_frames = 1 if IMAGE.value else arguments.pop("num_frames")
  try:
    frames = read(path, fps=fps, num_frames=num_frames, **size)
  except VideoError as error:
    raise UserError(f"{path}: {error}") from error
  return {"image": frames[0]} if IMAGE.value else {"video": frames}


def check_output(path: epath.Path) -> None:
  """Makes the folder of the output; raises UserError unless the file can be written there."""
  if path.suffix != ".mp4":
    raise UserError(f"--output={path}: videos are written as mp4; give a name ending in .mp4.")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
      raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not paths.is_address(os.fspath(path)):
      with tempfile.TemporaryFile(dir=path.parent):
        pass
  except OSError as error:
    raise UserError(
      f"--output={path}: nothing can be written there ({error.strerror}).\nChoose another folder."
    ) from error


def call_arguments(model: SampledModel) -> dict[str, Any]:
  """The arguments of the call: the flags, and the model's defaults for flags not given."""
  size, settings = default_size(model.transformer, model.vae), model.settings
  given = {
    "height": (HEIGHT.value, size.height),
    "width": (WIDTH.value, size.width),
    "num_frames": (NUM_FRAMES.value, size.num_frames),
    "num_inference_steps": (STEPS.value, settings.num_inference_steps),
    "solver": (SOLVER.value, settings.solver),
    "guidance_scale": (GUIDANCE_SCALE.value, settings.guidance_scale),
  }
  return {
    **({"strength": STRENGTH.value} if VIDEO.value else {}),
    "prompt": PROMPT.value,
    "negative_prompt": NEGATIVE_PROMPT.value,
    "seed": SEED.value,
    "use_dynamic_cfg": DYNAMIC_CFG.value,
    **{name: default if value is None else value for name, (value, default) in given.items()},
  }


if __name__ == "__main__":
  command.run(main)
