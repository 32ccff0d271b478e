"""Image and prompt to video, with a transformer that reads the image's latents beside the noise.

pipe = ImageToVideo.from_pretrained("CogVideoX-5b-I2V")
video = pipe(Image.open("boat.jpg"), "a boat leaves the harbour").frames[0]
"""

import jax.numpy as jnp

from cogvideox_jax.inference import pixels
from cogvideox_jax.inference.arguments import ImageToVideoArguments, converted
from cogvideox_jax.inference.call_signature import takes
from cogvideox_jax.inference.checks import check_choice
from cogvideox_jax.inference.output import VideoOutput
from cogvideox_jax.inference.pipeline import Pipeline
from cogvideox_jax.inference.request import make_request
from cogvideox_jax.models.vae_config import IMAGE_SCALES


class ImageToVideo(Pipeline):
  """Image to video (diffusers `CogVideoXImageToVideoPipeline`)."""

  takes_image = True

  @takes(ImageToVideoArguments, converted)
  def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
    self, arguments: ImageToVideoArguments
  ) -> VideoOutput:
    """Makes num_videos_per_prompt videos of each prompt that begin with an image.

    Raises:
      UserError: an argument is out of its range; before anything is compiled.
    """
    choice = arguments.image_scale or self.settings.image_scale
    check_choice("image_scale", choice, IMAGE_SCALES)
    request = make_request(self._model, arguments, arguments.num_frames)
    images = pixels.images(arguments.image, request.num_prompts, request.size)
    scale = self.vae_config.image_scale(choice)
    # The VAE encodes an image as a video of one frame; the other latent frames are zeros.
    zeros = ((0, 0), (0, request.latent_shape[0] - 1), (0, 0), (0, 0), (0, 0))
    encoded = self._frame_coder.encode(request, images[:, None])
    image_latents = [jnp.pad(scale * first, zeros) for first in encoded]
    return self._sample(request, request.initial_latents(), image_latents)
