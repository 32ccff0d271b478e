"""Image and prompt to video, with a transformer that sees the image's latents beside the noise.

pipe = ImageToVideo.from_pretrained("CogVideoX-5b-I2V")
video = pipe(Image.open("boat.jpg"), "a boat leaves the harbour").frames[0]
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from cogvideox_jax.inference import inputs, pixels
from cogvideox_jax.inference.output import VideoOutput
from cogvideox_jax.inference.pipeline import Latents, Pipeline
from cogvideox_jax.models.vae_config import IMAGE_SCALES


class ImageToVideo(Pipeline):
  """Names and defaults are those of diffusers' `CogVideoXImageToVideoPipeline`."""

  takes_image = True

  def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
    self,
    image: Any,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int = 49,
    num_inference_steps: int = 50,
    timesteps: Sequence[int] | None = None,
    guidance_scale: float | int = 6,
    use_dynamic_cfg: bool | str = False,
    num_videos_per_prompt: int = 1,
    eta: float = 0.0,
    generator: object = None,
    latents: Latents | None = None,
    prompt_embeds: inputs.Embeds | None = None,
    negative_prompt_embeds: inputs.Embeds | None = None,
    output_type: str = "pil",
    return_dict: bool = True,
    attention_kwargs: Mapping[str, Any] | None = None,
    callback_on_step_end: Callable[..., dict[str, Array]] | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    max_sequence_length: int | None = None,
    *,
    seed: int | Sequence[int] = 0,
    solver: str | None = None,
    batch_size: int | None = None,
    draws: inputs.Draws | None = None,
    image_scale: str | None = None,
  ) -> VideoOutput:
    """Makes videos that begin with an image; `Pipeline.__call__` says what is not said here.

    Args:
      image: one for all prompts or a list of one for each: PIL images, or arrays [H W 3] or
        [b H W 3] of bytes or of floats in [0, 1]. PIL images of another size are resized (Lanczos),
        arrays too (nearest pixel).
      image_scale: of the image's latents, one of vae_config.IMAGE_SCALES; by default the model's.

    Raises:
      UserError: an argument is out of its range; before anything is compiled.
    """
    size = self._size(num_frames, height, width)
    choice = image_scale or self.settings.image_scale
    inputs.check_choice("image_scale", choice, IMAGE_SCALES)
    arguments = inputs.from_call(locals())
    job = self._job(size, arguments, self._solver(arguments))
    images = pixels.images(image, len(job.halves[-1]), size)
    scale = self.vae_config.image_scale(choice)
    rest = ((0, 0), (0, job.shape[0] - 1), (0, 0), (0, 0), (0, 0))
    # An image is a video of one frame; all other latents are zeros.
    seen = [jnp.pad(scale * first, rest) for first in self._latents_of(job, images[:, None])]
    return self._output(job, self._denoise(job, self._initial_noise(job), seen))
