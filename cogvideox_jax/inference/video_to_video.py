"""Video and prompt to another video: the given one is noised part of the way and denoised again.

pipe = VideoToVideo.from_pretrained("CogVideoX-5b")
video = pipe(frames, "the same street in winter", strength=0.8).frames[0]
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from cogvideox_jax.diffusion.noise import add_noise
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference import pixels
from cogvideox_jax.inference.arguments import VideoToVideoArguments, converted
from cogvideox_jax.inference.call_signature import takes
from cogvideox_jax.inference.output import VideoOutput
from cogvideox_jax.inference.pipeline import Pipeline
from cogvideox_jax.inference.request import Request, make_request


class VideoToVideo(Pipeline):
  """Video to video (diffusers `CogVideoXVideoToVideoPipeline`)."""

  @takes(VideoToVideoArguments, converted)
  def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
    self, arguments: VideoToVideoArguments
  ) -> VideoOutput:
    """Makes num_videos_per_prompt videos of each prompt by changing a video.

    Raises:
      UserError: an argument is out of its range; before anything is compiled.
    """
    request = self._request(arguments)
    if arguments.latents is not None:
      return self._sample(request, request.initial_latents())
    frames = pixels.videos(arguments.video, request.num_prompts, request.size)
    clean = self._frame_coder.encode(request, frames)
    return self._sample(request, self._noised(request, clean))

  def _request(self, arguments: VideoToVideoArguments) -> Request:
    """Checks the arguments; the steps are the last ones, as many as `strength` says."""
    strength, steps = arguments.strength, arguments.num_inference_steps
    if not 0 <= strength <= 1:
      raise UserError(f"strength={strength}: must be from 0 to 1.")
    num_frames = self._num_frames(arguments)
    last_steps = min(int(steps * strength), steps)
    if last_steps < 1:
      raise UserError(f"strength={strength} of {steps} steps is none: raise one of them.")
    request = make_request(self._model, arguments, num_frames, last_steps)
    if request.extra_frames:
      raise UserError(
        f"{num_frames} frames are {request.latent_shape[0] - request.extra_frames} latent frames, "
        f"which patches of {self.config.patch[0]} do not divide:\n"
        "give a video whose latents they do."
      )
    return request

  def _num_frames(self, arguments: VideoToVideoArguments) -> int:
    """The frames of the given video, or those that the given latents decode to."""
    if (arguments.video is None) == (arguments.latents is None):
      raise UserError("Pass either video or latents.")
    if arguments.latents is not None:
      return (arguments.latents.shape[1] - 1) * self.vae_config.temporal_compression + 1
    return pixels.count_frames(arguments.video)

  def _noised(
    self, request: Request, clean: list[Float[Array, "chunk f h w c"]]
  ) -> list[Float[Array, "chunk f h w c"]]:
    """Scales the latents of each chunk and noises them to the first timestep."""
    alpha = self._model.schedule.alpha(jnp.asarray(request.steps[0].timestep))
    scale = self.vae_config.scaling_factor
    pairs = zip(clean, request.initial_latents(), strict=True)
    return [add_noise(latents * scale, noise, alpha) for latents, noise in pairs]
