"""The arguments of a call: each is defined here once, with its type, default and description.

A pipeline's `__call__` takes the fields of its dataclass, in their order (`call_signature.py`).
Names, order and defaults are those of diffusers' pipelines, except for `seed`, which replaces
`generator`, and for the keyword-only fields.

A dataclass lists the fields of its bases from the last base to the first. So the groups below are
bases, and each pipeline's dataclass names them in reverse order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any

import numpy as np
from jaxtyping import Array, Float

from cogvideox_jax.inference.checks import whole
from cogvideox_jax.inference.noise_draws import Draws

# Arguments that must be whole numbers; those of _WHOLE may be None.
_NEEDED = ("num_inference_steps", "num_videos_per_prompt", "seed")
_WHOLE = ("height", "width", "num_frames", "max_sequence_length", "batch_size")

Embeds = Float[Array | np.ndarray, "prompts l t"]  # Text states, as T5 returns them.
Latents = Float[Array | np.ndarray, "videos f h w c"]


@dataclass(frozen=True)
class _Image:
  image: Annotated[
    Any,
    "The first frame: one image for all prompts, or a list of one for each. PIL images, or arrays "
    "[H W 3] or [b H W 3] of bytes or of floats in [0, 1]. Images of another size are resized: PIL "
    "images with Lanczos, arrays to the nearest pixel.",
  ]


@dataclass(frozen=True)
class _Video:
  video: Annotated[
    Any,
    "The video to change: one for all prompts, or a list of one for each. A list of PIL frames, or "
    "an array [F H W 3] or [b F H W 3] of bytes or of floats in [0, 1], where F is 4k + 1. Frames "
    "of another size are resized: PIL frames with Lanczos, arrays to the nearest pixel. Needed "
    "unless `latents` is given.",
  ] = None


@dataclass(frozen=True)
class _Prompts:
  prompt: Annotated[
    str | Sequence[str] | None,
    "One prompt or several. A prompt that is longer than `max_sequence_length` is cut with a "
    "warning.",
  ] = None
  negative_prompt: Annotated[
    str | Sequence[str] | None,
    "What guidance moves away from: one for all prompts, or one for each. By default what replaced "
    "a dropped caption in training: zeros, or the encoded empty prompt.",
  ] = None
  height: Annotated[int | None, "Height in pixels; by default the model's."] = None
  width: Annotated[int | None, "Width in pixels; by default the model's."] = None


@dataclass(frozen=True)
class _Length:
  num_frames: Annotated[
    int | None,
    "Frames of a video: 4k + 1; by default the model's. For odd k the reference VAE decodes 4k + 4 "
    "frames.",
  ] = None


@dataclass(frozen=True)
class _Steps:
  num_inference_steps: Annotated[
    int, "Denoising steps, from 1 to the steps of the noise schedule (usually 1000)."
  ] = 50
  timesteps: Annotated[
    Sequence[int] | None,
    "Must be None, because diffusers' schedulers of CogVideoX do not take timesteps either.",
  ] = None


@dataclass(frozen=True)
class _Strength:
  strength: Annotated[
    float,
    "The fraction of the denoising steps that are taken, in [0, 1]; at 1 nothing remains of the "
    "given video.",
  ] = 0.8


@dataclass(frozen=True)
class _Rest:
  guidance_scale: Annotated[
    float | int,
    "Scale of classifier-free guidance. At 1 or less there is no guidance, which halves the work.",
  ] = 6
  use_dynamic_cfg: Annotated[
    bool | str,
    "Changes the guidance scale from step to step: True or 'wave' as the published samplers do, "
    "'ramp' as they intended.",
  ] = False
  num_videos_per_prompt: Annotated[int, "Videos of each prompt."] = 1
  eta: Annotated[float, "Has no effect, as in diffusers."] = 0.0
  generator: Annotated[
    object,
    "A generator of torch, or a list of one for each prompt, of which only the seed is read: its "
    "random numbers cannot be drawn here. Better use `seed`.",
  ] = None
  latents: Annotated[
    Latents | None,
    "Latents of all videos to start from: noise, in place of drawn noise. Video to video starts "
    "from noised latents, in place of `video`.",
  ] = None
  prompt_embeds: Annotated[Embeds | None, "Text states in place of `prompt`."] = None
  negative_prompt_embeds: Annotated[Embeds | None, "Text states in place of `negative_prompt`."] = (
    None
  )
  output_type: Annotated[str, "'pil', 'np', 'uint8' or 'latent'; see `VideoOutput`."] = "pil"
  return_dict: Annotated[
    bool, "Has no effect: a call always returns `VideoOutput`, which is a tuple."
  ] = True
  attention_kwargs: Annotated[
    Mapping[str, Any] | None,
    "{'scale': x} multiplies the weights of all LoRA adapters by x during this call.",
  ] = None
  callback_on_step_end: Annotated[
    Callable[..., dict[str, Array]] | None,
    "Called as f(pipe, step, timestep, arrays) after each step of each batch. Arrays that it "
    "returns replace the loop's arrays of the same name. Adapters that it sets apply from the next "
    "call on.",
  ] = None
  callback_on_step_end_tensor_inputs: Annotated[
    Sequence[str],
    "The arrays that the callback is given: 'latents', 'prompt_embeds' (with guidance, the "
    "negative ones before the positive ones, as in diffusers), 'negative_prompt_embeds'. A "
    "callback that sets `pipe._interrupt` ends the denoising.",
  ] = ("latents",)
  max_sequence_length: Annotated[
    int | None,
    "Text tokens of a prompt; by default the model's. Only models with rotary positions take other "
    "numbers.",
  ] = None
  _: KW_ONLY
  seed: Annotated[
    int | Sequence[int],
    "In [0, 2**32): one for all prompts, or one for each. Video k of a prompt depends on the "
    "prompt, the seed and k, and not on the rest of the call.",
  ] = 0
  solver: Annotated[str | None, "'ddim' or 'dpm'; by default the model's."] = None
  batch_size: Annotated[int | None, "Videos that are made at once; by default all."] = None
  draws: Annotated[
    Draws | None, "Replaces the drawn noise; see `noise_draws.Draws`. Meant for comparisons."
  ] = None


@dataclass(frozen=True)
class CallArguments(_Rest, _Steps, _Prompts):
  """The arguments that all pipelines have in common."""


def converted(name: str, value: Any) -> Any:
  """The value of a caller's argument: numpy's integers and whole floats become integers.

  Raises:
    UserError: an argument that must be a whole number is none.
  """
  if name == "seed" and isinstance(value, Sequence | np.ndarray) and not isinstance(value, str):
    return [whole(name, each) for each in value]
  if name in _WHOLE and value is None:
    return value
  return whole(name, value) if name in (*_WHOLE, *_NEEDED) else value


@dataclass(frozen=True)
class TextToVideoArguments(CallArguments, _Rest, _Steps, _Length, _Prompts):
  """The arguments of `Pipeline` (diffusers `CogVideoXPipeline`)."""


@dataclass(frozen=True)
class ImageToVideoArguments(CallArguments, _Rest, _Steps, _Length, _Prompts, _Image):
  """The arguments of `ImageToVideo` (diffusers `CogVideoXImageToVideoPipeline`)."""

  num_frames: Annotated[int, "Frames of a video: 4k + 1."] = 49
  image_scale: Annotated[
    str | None,
    "How the image's latents are scaled, one of `vae_config.IMAGE_SCALES`; by default the model's.",
  ] = field(default=None, kw_only=True)


@dataclass(frozen=True)
class VideoToVideoArguments(CallArguments, _Rest, _Strength, _Steps, _Prompts, _Video):
  """The arguments of `VideoToVideo` (diffusers `CogVideoXVideoToVideoPipeline`)."""
