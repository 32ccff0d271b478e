"""Video and prompt to another video: the given one is noised part of the way and denoised again.

pipe = VideoToVideo.from_pretrained("CogVideoX-5b")
video = pipe(frames, "the same street in winter", strength=0.8).frames[0]
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from cogvideox_jax.diffusion.noise import add_noise
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference import inputs, pixels
from cogvideox_jax.inference.output import VideoOutput
from cogvideox_jax.inference.pipeline import Job, Latents, Pipeline


class VideoToVideo(Pipeline):
  """Names and defaults are those of diffusers' `CogVideoXVideoToVideoPipeline`."""

  def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
    self,
    video: Any = None,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    timesteps: Sequence[int] | None = None,
    strength: float = 0.8,
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
  ) -> VideoOutput:
    """Changes a video as a prompt says; `Pipeline.__call__` says what is not said here.

    Args:
      video: one for all prompts or one each: a list of PIL frames, or an array [F H W 3] or
        [b F H W 3] of bytes or of floats in [0, 1]; F of the form 4k + 1. Other sizes are resized,
        PIL frames by Lanczos, arrays to the nearest pixel.
      strength: how much of the path from noise is taken, in [0, 1]; 1 forgets the video.
      latents: the noised latents to start from, in place of the video.

    Raises:
      UserError: an argument is out of its range; before anything is compiled.
    """
    if not 0 <= strength <= 1:
      raise UserError(f"strength={strength}: must be from 0 to 1.")
    if (video is None) == (latents is None):
      raise UserError("Pass either video or latents.")
    num_frames = self._num_frames(video, latents)
    size = self._size(num_frames, height, width)
    arguments = inputs.from_call(locals())
    steps = min(int(num_inference_steps * strength), num_inference_steps)
    if steps < 1:
      raise UserError(
        f"strength={strength} of {num_inference_steps} steps is none: raise one of them."
      )
    path = self._solver(arguments, start=num_inference_steps - steps)
    job = self._job(size, arguments, path, steps)
    if job.extra:
      raise UserError(
        f"{num_frames} frames are {job.shape[0] - job.extra} latent frames, which patches of "
        f"{self.config.patch[0]} do not divide:\ngive a video whose latents they do."
      )
    if latents is not None:
      return self._output(job, self._denoise(job, self._initial_noise(job)))
    videos = pixels.videos(video, len(job.halves[-1]), size)
    return self._output(job, self._denoise(job, self._noised(job, self._latents_of(job, videos))))

  def _num_frames(self, video: Any, latents: Latents | None) -> int:
    if latents is not None:
      return (latents.shape[1] - 1) * self.vae_config.temporal_compression + 1
    return pixels.count_frames(video)

  def _noised(self, job: Job, latents: list[Array]) -> list[Array]:
    """The latents of each chunk, scaled and noised to the first timestep."""
    alpha = self._schedule.alpha(jnp.asarray(job.steps[0].timestep))
    scale = self.vae_config.scaling_factor
    pairs = zip(latents, self._initial_noise(job), strict=True)
    return [add_noise(clean * scale, noise, alpha) for clean, noise in pairs]
