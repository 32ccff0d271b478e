"""Prompt to video: tokenizer, T5, the denoising loop and the VAE's decoder in one call.

  pipe = Pipeline.from_pretrained("model-folder")
  video = pipe("a red ball rolls", num_inference_steps=50, guidance_scale=6.0, seed=0).frames[0]

Programs are compiled once for each shape and shared by all pipelines of the same model configs,
so that a training run may make a new pipeline for each preview.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Float32
from PIL import Image

from cogvideox_jax.conversion.folder import Settings, open_model
from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.diffusion import guidance, solvers
from cogvideox_jax.diffusion.noise import NoiseConfig, noise_schedule
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference import inputs
from cogvideox_jax.inference.denoising import (
  INITIAL,
  Params,
  Step,
  denoise,
  denoise_step,
  draw_noise,
  solver_steps,
)
from cogvideox_jax.inference.inputs import Condition, Embeds, Size, Videos
from cogvideox_jax.inference.progress import COMPILE, Progress
from cogvideox_jax.models.dit import DiT, DiTConfig
from cogvideox_jax.models.graphs import compute_dtype, graph_of
from cogvideox_jax.models.t5 import T5Config, T5Encoder, encode_text
from cogvideox_jax.models.vae import VAE, VAEConfig, decode
from cogvideox_jax.sharding import replicated

SOLVERS = {"ddim": solvers.ddim, "dpm": solvers.dpm}
OUTPUT_TYPES = ("pil", "np", "uint8", "latent")
Latents = Float[Array | np.ndarray, "b f h w c"]


class VideoOutput(NamedTuple):
  """What a call returns: `frames[k]` is video k, those of a prompt side by side.

  By output_type: `pil` lists of PIL images, `np` float32 [b F H W 3] in [0, 1], `uint8` the same
  rounded to [0, 255], `latent` float32 [b f h w c], scaled, with the extra frames of CogVideoX 1.5.
  """

  frames: Any


class Pipeline:
  """Text to video. Cheap to make: nothing is compiled before the first call."""

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
  ):
    """Puts parameters that are on the host on the device; those already placed stay there.

    Args:
      transformer: config and parameters, as are vae and text_encoder. The parameters are an
        argument of the compiled programs: other values compile nothing anew.
      tokenizer: may be None where every call passes prompt_embeds and negative_prompt_embeds.
      noise: the schedule that the transformer was trained with.
      settings: what a caption dropped in training was, and how the model is best sampled.
      dtype: of the transformer's and text encoder's computation: float32, bfloat16, or auto,
        which is float32 on CPU and bfloat16 elsewhere. Latents and the VAE are float32.
      progress: what to show; by default bars on stderr.
    """
    self.config, self._params = transformer[0], jax.tree.map(jnp.asarray, transformer[1])
    if self.config.in_channels != self.config.out_channels:
      raise UserError(
        f"This transformer takes {self.config.in_channels} channels and makes "
        f"{self.config.out_channels}: it also wants an image, which is not supported yet."
      )
    self.vae_config, vae_params = vae
    text_config, self._text_params = text_encoder[0], jax.tree.map(jnp.asarray, text_encoder[1])
    self.settings = settings or Settings()
    self.progress = progress or Progress()
    self._tokenizer = tokenizer
    self._schedule = noise_schedule(noise)
    self._place = place_beside(self._params)
    compute = compute_dtype(dtype)
    self._graphdef = graph_of(DiT, self.config, dtype=compute)
    self._text_graphdef = graph_of(T5Encoder, text_config, dtype=compute)
    vae_params = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), vae_params)
    self._vae = nnx.merge(graph_of(VAE, self.vae_config), vae_params)

  @classmethod
  def from_pretrained(
    cls, model: epath.PathLike, *, dtype: str = "auto", progress: Progress | None = None
  ) -> "Pipeline":
    """The pipeline of a shipped name (`tiny`) or of a model folder in diffusers' layout.

    Raises:
      UserError: there is no such model, or a part of it is missing or damaged.
    """
    folder = open_model(model)
    return cls(
      folder.transformer(),
      folder.vae(),
      folder.text_encoder(),
      folder.tokenizer(),
      folder.scheduler(),
      folder.settings(),
      dtype=dtype,
      progress=progress,
    )

  def __call__(
    self,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float | int = 6,
    use_dynamic_cfg: bool = False,
    num_videos_per_prompt: int = 1,
    seed: int | Sequence[int] = 0,
    latents: Latents | None = None,
    prompt_embeds: Embeds | None = None,
    negative_prompt_embeds: Embeds | None = None,
    output_type: str = "pil",
    return_dict: bool = True,
    *,
    solver: str = "ddim",
    batch_size: int | None = None,
  ) -> VideoOutput:
    """Makes num_videos_per_prompt videos of each prompt.

    Names and defaults are those of diffusers' `CogVideoXPipeline`, but for `seed`, which replaces
    `generator`, and what follows return_dict. `settings` holds what the model was made for.

    Args:
      prompt: one or several. One that is longer than the model's text is cut with a warning.
      negative_prompt: what to move away from, one for all prompts or one each. By default what
        stood for a dropped caption in training: zeros, or the encoded empty prompt.
      height: pixels, as width; by default those of the model's config, as num_frames.
      num_frames: of the form 4k + 1. The reference VAE decodes an odd k to 4k + 4 frames.
      num_inference_steps: up to the steps of the noise schedule, usually 1000.
      guidance_scale: up to 1 there is no guidance, and half the work.
      use_dynamic_cfg: lets the scale change with the timestep, as the published samplers do.
      seed: in [0, 2**32), one for all prompts or one each. Video k of a prompt depends on the
        prompt, the seed and k, not on what else is in the call.
      latents: initial noise of all videos, in place of drawn noise.
      prompt_embeds: text states in place of prompt; negative_prompt_embeds likewise.
      output_type: pil, np, uint8 or latent; see VideoOutput.
      return_dict: taken for diffusers' sake; what is returned is a tuple in any case.
      solver: ddim or dpm.
      batch_size: how many videos to make at once; by default all.

    Raises:
      UserError: an argument is out of its range; before anything is compiled.
    """
    size = self._size(num_frames, height, width)
    inputs.check_choice("output_type", output_type, OUTPUT_TYPES)
    inputs.check_choice("solver", solver, SOLVERS)
    path = SOLVERS[solver](self._schedule, num_inference_steps)
    scales = guidance.constant_scales(float(guidance_scale), path.timesteps)
    if use_dynamic_cfg:
      scales = guidance.dynamic_scales(float(guidance_scale), path.timesteps, num_inference_steps)
    halves = [inputs.condition("prompt", prompt, prompt_embeds)]
    if guidance_scale > 1:
      negative = self._negative(negative_prompt, negative_prompt_embeds, len(halves[0]))
      halves.insert(0, negative)
    self._check_conditions(halves)
    videos = inputs.plan_videos(seed, len(halves[0]), num_videos_per_prompt)
    shape, extra = inputs.latent_shape(size, self.config, self.vae_config)
    if latents is not None:
      inputs.check_shape("latents", latents, (len(videos.seeds), *shape))

    text = self._encode(halves, batch_size)
    chunks = [videos.take(places) for places in inputs.chunks(len(videos.seeds), batch_size)]
    noise = [
      draw_noise(chunk.seeds, chunk.indices, INITIAL, shape)
      if latents is None
      else jnp.asarray(latents[chunk.places], jnp.float32)
      for chunk in chunks
    ]
    latents = self._denoise(noise, text, chunks, solver_steps(path, scales))
    if output_type == "latent":
      frames = np.asarray(latents)
    else:
      frames = as_output(self._decode(latents[:, extra:], batch_size), output_type)
    return VideoOutput(frames)

  @property
  def default_size(self) -> Size:
    """The size that the transformer was made for (its config's `sample_*`)."""
    scale, config = self.vae_config.spatial_compression, self.config
    return Size(config.sample_frames, config.sample_height * scale, config.sample_width * scale)

  def _size(self, *given: int | None) -> Size:
    """The size asked for, num_frames, height and width, checked; the model's where it is None."""
    pairs = zip(given, self.default_size, strict=True)
    size = Size(*(default if value is None else value for value, default in pairs))
    inputs.check_size(size, self.config, self.vae_config)
    return size

  def _negative(
    self, prompt: str | Sequence[str] | None, embeds: Embeds | None, count: int
  ) -> Condition:
    """What each of `count` prompts moves away from."""
    if prompt is None and embeds is None:
      if self.settings.text_drop == "zeros":
        return np.zeros((count, self.config.text_length, self.config.text_width), np.float32)
      prompt = ""
    negative = inputs.condition("negative_prompt", prompt, embeds)
    if isinstance(negative, list) and len(negative) == 1:
      negative = negative * count
    if len(negative) != count:
      raise UserError(
        f"{len(negative)} negative prompts for {count} prompts: pass one, or one for each prompt."
      )
    return negative

  def _check_conditions(self, halves: list[Condition]) -> None:
    for half in halves:
      if not isinstance(half, list):
        shape = (len(half), self.config.text_length, self.config.text_width)
        inputs.check_shape("prompt_embeds", half, shape)

  def _encode(
    self, halves: list[Condition], batch_size: int | None
  ) -> Float[Array, "halves b l t"]:
    """Text states of each half of guidance. A prompt that stands twice is encoded once."""
    prompts = list(dict.fromkeys(p for half in halves if isinstance(half, list) for p in half))
    table = {}
    if prompts:
      if self._tokenizer is None:
        raise UserError("There is no tokenizer: pass prompt_embeds and negative_prompt_embeds.")
      ids = self._tokenizer.encode(prompts, self.config.text_length)
      chunks = inputs.chunks(len(prompts), batch_size)
      with self.progress.phase("encode", len(chunks)) as bar:
        for chunk in chunks:
          states = encode_text(self._text_params, ids[chunk], graphdef=self._text_graphdef)
          table.update(zip((prompts[i] for i in chunk), jax.block_until_ready(states), strict=True))
          bar.update()
    return jnp.stack(
      [
        jnp.stack([table[p] for p in half]) if isinstance(half, list) else jnp.asarray(half)
        for half in halves
      ]
    )

  def _denoise(
    self,
    noise: list[Array],
    text: Float[Array, "halves prompts l t"],
    chunks: list[Videos],
    steps: list[Step],
  ) -> Float[Array, "b f h w c"]:
    """Takes the noise of each chunk of videos [chunk f h w c] to the latents of all."""
    texts = [text[:, chunk.prompts] for chunk in chunks]
    noise, texts = jax.device_put((noise, texts), self._place)
    fixed = {"graphdef": self._graphdef, "config": self.config}
    with self.progress.phase(COMPILE) as bar:
      x = noise[0]
      denoise_step.lower(self._params, x, x, x, texts[0], steps[0], **fixed).compile()
      bar.update()

    def run(*arguments):
      return jax.device_put(denoise_step(self._params, *arguments, **fixed), self._place)

    with self.progress.phase("denoise", len(chunks) * len(steps)) as bar:
      latents = [
        denoise(run, *start, steps, bar.update) for start in zip(noise, texts, chunks, strict=True)
      ]
    return jnp.concatenate(latents)[: chunks[-1].places[-1] + 1]

  def _decode(
    self, latents: Float[Array, "b f h w c"], batch_size: int | None
  ) -> Float32[np.ndarray, "b F H W 3"]:
    """Frames in [0, 1], on the host."""
    chunks = inputs.chunks(len(latents), batch_size)
    videos = []
    with self.progress.phase("decode", len(chunks)) as bar:
      for chunk in chunks:
        z = latents[chunk] / self.vae_config.scaling_factor
        videos.append(np.asarray(jnp.clip(decode(self._vae, z) / 2 + 0.5, 0, 1)))
        bar.update()
    return np.concatenate(videos)[: len(latents)]


def place_beside(params: Params) -> NamedSharding | None:
  """Where latents go: to all devices of the mesh that the parameters are on, if they are on one.

  Left on one device, the first step's latents would lie elsewhere than those that it returns, and
  the program be compiled twice.
  """
  place = jax.tree.leaves(params)[0].sharding
  if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh):
    return replicated(place.mesh)
  return None


def as_output(frames: Float[np.ndarray, "b F H W 3"], output_type: str) -> Any:
  """Frames in [0, 1] as pil, np or uint8; the rounding is diffusers'."""
  if output_type == "np":
    return frames
  rounded = np.round(255 * frames).astype(np.uint8)
  if output_type == "uint8":
    return rounded
  return [[Image.fromarray(frame) for frame in video] for video in rounded]
