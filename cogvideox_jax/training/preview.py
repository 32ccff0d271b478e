"""Samples a few fixed prompts, with images if the model sees one, as the transformer learns."""

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
from cogvideox_jax.training.preview_files import preview_path
from cogvideox_jax.training.workdir import load_frozen, with_transformer
from cogvideox_jax.types import Params


class Previewer:
  """Samples the config's prompts with fixed seeds, so that previews differ only by the weights.

  Of several processes the first one samples, on its own devices. The others only give it their
  shards of the weights.
  """

  def __init__(self, config: TrainConfig, folder: epath.Path):
    """Loads the frozen networks and the images.

    Raises:
      UserError: one of them is missing or damaged.
    """
    self._config, self._folder = config, folder
    if not hosts.is_first():
      return
    self._frozen = load_frozen(config)
    self._images = [_read_image(path, config) for path in config.preview.images]

  def write(self, step: int, model: DiTConfig, params: Params) -> None:
    """Adds FOLDER/step_NNNNNN.mp4 with the videos side by side, and their contact sheet, .png.

    Every process of a job calls it; the first one writes.

    Args:
      params: on the mesh of the training.
    """
    if jax.process_count() > 1:
      params = jax.tree.map(hosts.whole, params)
      if not hosts.is_first():
        return
      params = sharding.share_out(params)
    videos = self._sample(model, params)
    prompts = list(self._config.preview.prompts)
    write_mp4(
      preview_path(self._folder, step, ".mp4"),
      np.concatenate(videos, axis=2),
      self._config.data.fps,
      {"step": step, "prompts": prompts},
    )
    contact_sheet(videos, prompts, preview_path(self._folder, step, ".png"))

  def _sample(self, model: DiTConfig, params: Params) -> list[UInt8[np.ndarray, "F H W 3"]]:
    """Returns a video of each prompt. Its seed is its index."""
    config = self._config.preview
    kind = ImageToVideo if self._images else Pipeline
    transformer = model, params
    pipe = with_transformer(self._config, transformer, self._frozen, Progress(show=False), kind)
    images: dict[str, Any] = {"image": self._images} if self._images else {}
    videos = pipe(
      **images,
      prompt=list(config.prompts),
      num_frames=config.num_frames,
      height=config.height,
      width=config.width,
      num_inference_steps=config.steps,
      guidance_scale=config.guidance_scale,
      seed=list(range(len(config.prompts))),
      output_type="uint8",
    ).frames
    return list(videos)


def _read_image(path: str, config: TrainConfig) -> UInt8[np.ndarray, "H W 3"]:
  """Reads an image, resized and cropped to the size of the previews."""
  height, width = config.preview.height, config.preview.width
  try:
    return read(path, fps=config.data.fps, num_frames=1, height=height, width=width)[0]
  except VideoError as error:
    raise UserError(f"config.preview.images: {path}: {error}") from error
