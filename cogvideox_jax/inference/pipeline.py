"""Prompt to video: tokenizer, T5, the denoising loop and the VAE's decoder in one call.

  pipe = Pipeline.from_pretrained("model-folder")
  video = pipe("a red ball rolls", num_inference_steps=50, guidance_scale=6.0, seed=0).frames[0]

`ImageToVideo` and `VideoToVideo` are built on `Pipeline`. Each program is compiled once for each
shape and shared by all pipelines of the same model configs, so that a training run can make a new
pipeline for each preview.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float

from cogvideox_jax.conversion.folder import Settings, open_model
from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.diffusion.noise import NoiseConfig, noise_schedule
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference import calls_of_diffusers, out_of_memory
from cogvideox_jax.inference.adapters import Adapters
from cogvideox_jax.inference.arguments import TextToVideoArguments, converted
from cogvideox_jax.inference.call_signature import takes
from cogvideox_jax.inference.callback import call_back
from cogvideox_jax.inference.checks import check_finite
from cogvideox_jax.inference.denoising import StepProgram, denoise
from cogvideox_jax.inference.frame_coding import FrameCoder
from cogvideox_jax.inference.offload import loaded_for, put_transformer, to_host
from cogvideox_jax.inference.output import VideoOutput, as_output
from cogvideox_jax.inference.progress import COMPILE, Progress
from cogvideox_jax.inference.prompt_encoding import PromptEncoder
from cogvideox_jax.inference.request import Request, SampledModel, make_request
from cogvideox_jax.inference.size import Size, default_size
from cogvideox_jax.inference.step_sharding import shard_step
from cogvideox_jax.inference.switches import SwitchesOfDiffusers
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.graphs import compute_dtype, graph_of
from cogvideox_jax.models.t5 import T5Config
from cogvideox_jax.models.vae_config import VAEConfig
from cogvideox_jax.types import Params

_DIVERGED = (
  "The weights, with any LoRA, lead to an overflow: lower the LoRA's weight or guidance_scale, try "
  "dtype float32, or take an earlier checkpoint."
)
Kind = TypeVar("Kind", bound="Pipeline")


class Pipeline(Adapters, SwitchesOfDiffusers):
  """Text to video. Making one compiles nothing; the first call does."""

  takes_image = False  # Whether the transformer reads the latents of an image beside the noise.

  def __init__(
    self,
    transformer: tuple[DiTConfig, Params],
    vae: tuple[VAEConfig, Params],
    text_encoder: tuple[T5Config, Params],
    tokenizer: Tokenizer | None,
    noise: NoiseConfig,
    settings: Settings | None = None,
    *,
    dtype: str = "auto",
    progress: Progress | None = None,
    devices: Sequence[Any] | None = None,
    offload: bool = False,
  ):
    """Puts parameters that are on the host on the devices; those already on a mesh stay there.

    Args:
      transformer: config and parameters, lazy or not, as are vae and text_encoder. Parameters are
        arguments of the compiled programs, so that other values need no new compilation.
      tokenizer: may be None if every call passes prompt_embeds and negative_prompt_embeds.
      noise: the schedule that the transformer was trained with.
      settings: what replaced a dropped caption in training, and how the model is best sampled.
      dtype: in which the transformer and the text encoder compute: float32, bfloat16, or auto,
        which is float32 on CPU and bfloat16 elsewhere. Latents and the VAE are in float32.
      progress: what to show; by default bars on stderr.
      devices: that share each step of the transformer; by default those of its parameters' mesh,
        else all accelerators of this host, or the first CPU.
      offload: keeps all parameters in the host's memory, and on the devices only those of the phase
        that runs. The devices then need memory for the largest component instead of all of them,
        and the videos are the same. Each phase copies its parameters to the devices anew, and the
        host keeps one copy for each device.

    Raises:
      UserError: the transformer is for another kind of pipeline, or the memory is too small.
    """
    super().__init__()
    self.config, params = transformer
    self.check_channels(self.config)
    self._devices, self._params = put_transformer(params, devices, offload)
    self.vae_config = vae[0]
    self.settings = settings or Settings()
    self.progress = progress or Progress()
    self._replicated = shard_step(1, self._devices).replicated
    compute = compute_dtype(dtype)
    first = SingleDeviceSharding(self._devices[0])
    self._prompt_encoder = PromptEncoder(
      text_encoder, tokenizer, dtype=compute, sharding=first, on_host=offload
    )
    self._frame_coder = FrameCoder(vae, sharding=self._replicated, on_host=offload)
    self._graphdef = graph_of(DiT, self.config, dtype=compute)
    self._noise = noise
    self._interrupt = False  # A callback sets it to end the denoising of the call.
    self._model = SampledModel(self.config, self.vae_config, noise_schedule(noise), self.settings)

  @classmethod
  def from_pretrained(
    cls: type[Kind],
    model: epath.PathLike,
    *,
    dtype: str = "auto",
    torch_dtype: Any = None,
    progress: Progress | None = None,
    offload: bool = False,
  ) -> Kind:
    """Loads a shipped model (`tiny`) or a model folder in diffusers' layout.

    Args:
      torch_dtype: as diffusers' calls have it, in place of dtype: `torch.bfloat16` or its name.
        float16 computes in bfloat16, which does not overflow.

    The other arguments are those of `Pipeline`.

    Raises:
      UserError: there is no such model, or a component of it is missing or damaged.
    """
    if torch_dtype is not None:
      dtype = calls_of_diffusers.dtype_name(torch_dtype)
    folder = open_model(model)
    return cls(
      folder.open("transformer"),
      folder.open("vae"),
      folder.open("text_encoder"),
      folder.tokenizer() if folder.has("tokenizer") else None,
      folder.scheduler(),
      folder.settings(),
      dtype=dtype,
      progress=progress,
      offload=offload,
    )

  @takes(TextToVideoArguments, converted)
  def __call__(self, arguments: TextToVideoArguments) -> VideoOutput:
    """Makes num_videos_per_prompt videos of each prompt.

    Raises:
      UserError: an argument is out of its range; before anything is compiled.
    """
    request = make_request(self._model, arguments, arguments.num_frames)
    return self._sample(request, request.initial_latents())

  @property
  def default_size(self) -> Size:
    """The size that the transformer was made for (`sample_*` of its config)."""
    return default_size(self.config, self.vae_config)

  def enable_slicing(self, enabled: bool = True) -> None:
    """Makes the VAE decode one video at a time: less memory, the same frames."""
    self._frame_coder.slicing = enabled

  def enable_tiling(self, enabled: bool = True) -> None:
    """Makes the VAE process videos larger than half its sample size in overlapping tiles."""
    self._frame_coder.tiling = self.vae_config.tiling if enabled else None

  def enable_model_cpu_offload(self) -> None:
    """Moves all parameters to the host's memory, as `offload` of `Pipeline` does from the start.

    To load a model that the devices cannot hold, pass `offload` to `Pipeline`.
    """
    fused, adapters = self._fused or (None, {})
    self._params, self._base, fused = to_host((self._params, self._base, fused))
    self._fused = None if fused is None else (fused, adapters)
    for component in (self._prompt_encoder, self._frame_coder):
      component.params = to_host(component.params)

  @classmethod
  def check_channels(cls, transformer: DiTConfig) -> None:
    """Raises UserError if the transformer reads an image and this pipeline has none, or reverse."""
    if transformer.takes_image == cls.takes_image:
      return
    wanted, is_there = ("Pipeline", "no image") if cls.takes_image else ("ImageToVideo", "an image")
    raise UserError(
      f"This transformer takes {transformer.in_channels} channels and makes "
      f"{transformer.out_channels}: it sees {is_there} beside the noise.\nUse {wanted} for it."
    )

  def _sample(
    self,
    request: Request,
    initial: list[Float[Array, "chunk f h w c"]],
    image_latents: list[Float[Array, "chunk f h w c"]] | None = None,
  ) -> VideoOutput:
    """Denoises and decodes.

    Args:
      initial: the latents that each chunk of videos starts from.
      image_latents: what the transformer reads beside them, for each chunk.
    """
    latents = self._denoise(request, initial, image_latents)
    check_finite("The result of denoising", latents, _DIVERGED)
    output_type = request.arguments.output_type
    if output_type == "latent":
      return VideoOutput(np.asarray(latents))
    frames = self._frame_coder.decode(
      latents[:, request.extra_frames :], request.arguments.batch_size, self.progress
    )
    return VideoOutput(as_output(frames, output_type))

  def _denoise(
    self,
    request: Request,
    initial: list[Float[Array, "chunk f h w c"]],
    image_latents: list[Float[Array, "chunk f h w c"]] | None,
  ) -> Float[Array, "b f h w c"]:
    """Encodes the prompts and takes the latents of each chunk through all steps."""
    text = self._prompt_encoder.encode(request, self.progress, self._replicated)
    check_finite("The text states", text, "The text encoder overflows: try dtype float32.")
    texts = [text[:, chunk.prompts] for chunk in request.chunks]
    images = image_latents or [None] * len(initial)
    # Put the first latents on all devices: otherwise the input sharding of the first step differs
    # from that of its output, and the step compiles twice.
    initial, texts, images = jax.device_put((initial, texts, images), self._replicated)
    with (
      self._scaled((request.arguments.attention_kwargs or {}).get("scale", 1.0)),
      loaded_for(out_of_memory.DENOISE, self._params) as params,
    ):
      return self._run_steps(params, request, initial, texts, images)

  def _run_steps(
    self,
    params: Params,
    request: Request,
    initial: list[Float[Array, "chunk f h w c"]],
    texts: list[Float[Array, "halves chunk l t"]],
    images: list[Float[Array, "chunk f h w c"] | None],
  ) -> Float[Array, "b f h w c"]:
    """Compiles one step, and runs it for all steps of each chunk."""
    self._interrupt = False
    halves, videos = texts[0].shape[:2]
    step_sharding = shard_step(halves * videos, self._devices)
    program = StepProgram(self._graphdef, self.config, step_sharding, self._devices[0])
    with self.progress.phase(COMPILE) as bar:
      arrays = initial[0], initial[0], initial[0], texts[0], images[0]
      program.lower(params, *arrays, request.steps[0]).compile()
      bar.update()
    with self.progress.phase("denoise", len(request.chunks) * len(request.steps)) as bar:

      def on_step(index: int, latents: Array, text: Array) -> tuple[Array, Array]:
        bar.update()
        timestep = int(request.steps[index].timestep)
        return call_back(self, request.arguments, index, timestep, latents, text)

      run_step = partial(program.run, params)
      denoised = [
        denoise(
          run_step,
          first,
          text,
          image,
          request.steps,
          partial(request.draw, chunk),
          on_step,
          lambda: self._interrupt,
        )
        for first, text, image, chunk in zip(initial, texts, images, request.chunks, strict=True)
      ]
    return jnp.concatenate(denoised)[: len(request.videos.seeds)]
