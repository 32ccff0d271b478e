"""What the model makes of a few fixed prompts, as it learns."""

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from cogvideox_jax.data.video import contact_sheet, write_mp4
from cogvideox_jax.inference.progress import Progress
from cogvideox_jax.training.state import Params
from cogvideox_jax.training.workdir import load_frozen, with_transformer


class Previewer:
  """Samples the config's prompts with fixed seeds, so that previews differ by the weights alone."""

  def __init__(self, config: ConfigDict, folder: epath.Path):
    """Loads the frozen networks; a UserError if the components lack one."""
    self._config, self._folder, self._frozen = config, folder, load_frozen(config)

  def write(self, step: int, params: Params) -> None:
    """Adds FOLDER/step_NNNNNN.mp4, the videos side by side, and a contact sheet of them, .png."""
    config = self._config.preview
    pipe = with_transformer(self._config, params, self._frozen, Progress(show=False))
    prompts = list(config.prompts)
    videos = pipe(
      prompts,
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
