"""What scripts written for diffusers pass and use: dtypes, devices, generators, schedulers."""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cogvideox_jax.conversion import component_fields
from cogvideox_jax.data.media import VideoError
from cogvideox_jax.data.mp4 import write_mp4
from cogvideox_jax.data.video import probe, read
from cogvideox_jax.diffusion.noise import NoiseConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.paths import is_address

_DTYPES = ("float32", "bfloat16", "float16")
_DEVICES = ("cpu", "cuda", "tpu", "gpu", "xla", "mps", "xpu")


def dtype_name(dtype: Any) -> str:
  """The name of a dtype of torch, numpy or jax, or a name, as `Pipeline` takes it.

  Raises:
    UserError: nothing is computed in that dtype here.
  """
  name = getattr(dtype, "__name__", str(dtype)).removeprefix("torch.")
  if name not in (*_DTYPES, "auto"):
    raise UserError(f"torch_dtype={dtype}: must be one of {', '.join(_DTYPES)}.")
  if name == "float16":
    warnings.warn("float16 is computed as bfloat16, which does not overflow.", stacklevel=3)
    return "bfloat16"
  return name


def check_device(device: Any) -> None:
  """Raises UserError unless a value names a kind of device, with or without a number."""
  if str(device).split(":")[0] not in _DEVICES:
    raise UserError(
      f"to({device}): not a device. The dtype is an argument of from_pretrained (dtype=), and "
      "JAX's devices are chosen by JAX_PLATFORMS."
    )


def seeds_of(generator: Any) -> int | list[int]:
  """The seeds of a generator of torch, or of a list of them; only the seed of it is read.

  Raises:
    UserError: it does not say its seed.
  """
  if isinstance(generator, Sequence):
    return [_seed_of(each) for each in generator]
  return _seed_of(generator)


def _seed_of(generator: Any) -> int:
  initial_seed = getattr(generator, "initial_seed", None)
  if initial_seed is None:
    raise UserError(
      "generator cannot be given: torch's random numbers are not drawn here.\n"
      "Pass seed=, one for all prompts or one each; or the noise itself as latents."
    )
  return int(initial_seed())


@dataclasses.dataclass(frozen=True)
class Scheduler:
  """A noise schedule, and the solver that diffusers has a class of schedulers for."""

  noise: NoiseConfig
  solver: str  # One of `component_fields.SCHEDULERS`.

  @property
  def config(self) -> dict[str, Any]:
    """The fields of diffusers' scheduler_config.json."""
    return component_fields.write_noise(self.noise, self.solver)


class _SchedulerClass:
  """A class of diffusers' schedulers, as far as pipelines use it."""

  def __init__(self, solver: str):
    self._solver = solver

  def from_config(self, config: dict[str, Any], **changes: Any) -> Scheduler:
    """The scheduler of a config with changes; UserError for a field that is not supported."""
    fields = {**config, **changes, "_class_name": component_fields.SCHEDULERS[self._solver]}
    return Scheduler(component_fields.read_noise(fields, "from_config"), self._solver)


CogVideoXDDIMScheduler = _SchedulerClass("ddim")
CogVideoXDPMScheduler = _SchedulerClass("dpm")


def export_to_video(
  video_frames: Any, output_video_path: os.PathLike | str, fps: float | int = 10
) -> str:
  """Writes frames as mp4 and returns the path (diffusers `export_to_video`).

  video_frames: PIL images, or arrays [H W 3] of bytes or of floats in [0, 1].
  """
  frames = np.stack([np.asarray(frame) for frame in video_frames])
  if frames.dtype != np.uint8:
    frames = np.round(255 * np.clip(frames, 0, 1)).astype(np.uint8)
  write_mp4(output_video_path, frames, float(fps))
  return str(output_video_path)


def load_image(image: os.PathLike | str | Image.Image) -> Image.Image:
  """Returns a picture upright and in sRGB (diffusers `load_image`).

  image: a file or an image.

  Raises:
    UserError: it is an address, of which nothing is fetched, or no picture that can be read.
  """
  if isinstance(image, Image.Image):
    return image.convert("RGB")
  return Image.fromarray(_read("load_image", image)[0])


def load_video(video: os.PathLike | str) -> list[Image.Image]:
  """Returns all frames of a video upright and in sRGB, at its own rate (diffusers `load_video`).

  Raises:
    UserError: it is an address, of which nothing is fetched, or no video that can be read.
  """
  return [Image.fromarray(frame) for frame in _read("load_video", video)]


def _read(call: str, path: os.PathLike | str) -> UInt8[np.ndarray, "F H W 3"]:
  if is_address(os.fspath(path)):
    raise UserError(f"{call}({path}): nothing is fetched here; download it, and give the file.")
  try:
    info = probe(path)
    fps = info.fps or 1.0
    return read(path, fps=fps, num_frames=info.frames_at(fps), height=info.height, width=info.width)
  except VideoError as error:
    raise UserError(f"{call}({path}): {error}") from error
