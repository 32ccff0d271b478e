"""What the model makes of a few fixed prompts, and images if it sees one, as it learns."""

from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8

from cogvideox_jax import hosts, sharding
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.data.contact_sheet import contact_sheet
from cogvideox_jax.data.media import VideoError
from cogvideox_jax.data.mp4 import write_mp4
from cogvideox_jax.data.video import read
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference.image_to_video import ImageToVideo
from cogvideox_jax.inference.pipeline import Pipeline
from cogvideox_jax.inference.progress import Progress
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.training.workdir import load_frozen, with_transformer
from cogvideox_jax.types import Params


class Previewer:
  """Samples the config's prompts with fixed seeds, so that previews differ by the weights alone.

  Of several processes the first samples, on its own devices, and the others only give it their
  parts of the weights.
  """

  def __init__(self, config: TrainConfig, folder: epath.Path):
    """Loads the frozen networks and the images; a UserError if one is missing or damaged."""
    self._config, self._folder = config, folder
    if not hosts.is_first():
      return
    self._frozen = load_frozen(config)
    self._images = [_read_image(path, config) for path in config.preview.images]

  def write(self, step: int, model: DiTConfig, params: Params) -> None:
    """Adds FOLDER/step_NNNNNN.mp4, the videos side by side, and a contact sheet of them, .png."""
    if jax.process_count() > 1:
      params = jax.tree.map(hosts.whole, params)
      if not hosts.is_first():
        return
      params = sharding.share_out(params)
    config = self._config.preview
    kind = ImageToVideo if self._images else Pipeline
    transformer = model, params
    pipe = with_transformer(self._config, transformer, self._frozen, Progress(show=False), kind)
    prompts = list(config.prompts)
    images: dict[str, Any] = {"image": self._images} if self._images else {}
    videos = pipe(
      **images,
      prompt=prompts,
      num_frames=config.num_frames,
      height=config.height,
      width=config.width,
      num_inference_steps=config.steps,
      guidance_scale=config.guidance_scale,
      seed=list(range(len(prompts))),
      output_type="uint8",
    ).frames
    self._folder.mkdir(parents=True, exist_ok=True)
    name = f"step_{step:06d}"
    made_with = {"step": step, "prompts": prompts}
    fps = self._config.data.fps
    write_mp4(self._folder / f"{name}.mp4", np.concatenate(videos, axis=2), fps, made_with)
    contact_sheet(list(videos), prompts, self._folder / f"{name}.png")


def _read_image(path: str, config: TrainConfig) -> UInt8[np.ndarray, "H W 3"]:
  """Cropped to the size of the previews."""
  height, width = config.preview.height, config.preview.width
  try:
    return read(path, fps=config.data.fps, num_frames=1, height=height, width=width)[0]
  except VideoError as error:
    raise UserError(f"config.preview.images: {path}: {error}") from error
