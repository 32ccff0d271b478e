"""Prompt to video: tokenizer, T5, the denoising loop and the VAE's decoder in one call.

  pipe = Pipeline.from_pretrained("model-folder")
  video = pipe("a red ball rolls", num_inference_steps=50, guidance_scale=6.0, seed=0).frames[0]

`ImageToVideo` and `VideoToVideo` stand on it. Programs are compiled once for each shape and shared
by all pipelines of the same model configs, so that a training run may make a new pipeline for each
preview.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float, Float32

from cogvideox_jax.conversion import tensors
from cogvideox_jax.conversion.folder import Settings, open_model
from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.diffusion import guidance, solvers
from cogvideox_jax.diffusion.noise import NoiseConfig, noise_schedule
from cogvideox_jax.diffusion.solvers import SOLVERS
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference import inputs, out_of_memory, residence
from cogvideox_jax.inference.adapters import Adapters
from cogvideox_jax.inference.denoising import (
  INITIAL,
  POSTERIOR,
  Params,
  Step,
  denoise,
  drawn,
  jit_step,
  solver_steps,
  spread,
)
from cogvideox_jax.inference.inputs import Arguments, Condition, Size, Videos
from cogvideox_jax.inference.output import OUTPUT_TYPES, VideoOutput, as_output
from cogvideox_jax.inference.progress import COMPILE, Progress
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.graphs import compute_dtype, graph_of
from cogvideox_jax.models.t5 import T5Config, T5Encoder, encode_text
from cogvideox_jax.models.tiling import Tiling
from cogvideox_jax.models.vae import VAE, decode, encode, sample_posterior
from cogvideox_jax.models.vae_config import VAEConfig

Latents = Float[Array | np.ndarray, "b f h w c"]


class Job(NamedTuple):
  """A call whose arguments were checked."""

  arguments: Arguments
  halves: list[Condition]  # Negative and positive prompts; the positive alone if not guided.
  text_length: int  # Tokens of each.
  videos: Videos
  chunks: list[Videos]  # Those that are made at once.
  steps: list[Step]
  shape: tuple[int, ...]  # Of a video's latents.
  extra: int  # Latent frames in front that are dropped before decoding.

  def noise(self, chunk: Videos, draw: int, shape: tuple[int, ...]) -> Array:
    """Standard normal numbers, drawn by each video's seed or given by the caller's `draws`."""
    return jnp.asarray((self.arguments.draws or drawn)(chunk, draw, shape), jnp.float32)


class Pipeline(Adapters):
  """Text to video. Cheap to make: nothing is compiled before the first call."""

  takes_image = False  # Whether the transformer sees the latents of an image beside the noise.

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
      transformer: config and parameters, lazy or not, as are vae and text_encoder. The parameters
        are an argument of the compiled programs: other values compile nothing anew.
      tokenizer: may be None where every call passes prompt_embeds and negative_prompt_embeds.
      noise: the schedule that the transformer was trained with.
      settings: what a caption dropped in training was, and how the model is best sampled.
      dtype: of the transformer's and text encoder's computation: float32, bfloat16, or auto,
        which is float32 on CPU and bfloat16 elsewhere. Latents and the VAE are float32.
      progress: what to show; by default bars on stderr.
      devices: that share each step of the transformer; by default those of its parameters' mesh,
        else all accelerators of this host, or the first CPU.
      offload: keeps all parameters in the host's memory, and on the devices only those of the phase
        that runs: what a call needs there is its largest phase, not the sum. The videos are the
        same; each phase copies its part to the devices anew. The host keeps a copy for each device.
    """
    super().__init__()
    self.config = transformer[0]
    self._devices, self._params = residence.place(transformer[1], devices, offload)
    if self.config.takes_image != self.takes_image:
      wanted, is_there = (
        ("Pipeline", "no image") if self.takes_image else ("ImageToVideo", "an image")
      )
      raise UserError(
        f"This transformer takes {self.config.in_channels} channels and makes "
        f"{self.config.out_channels}: it sees {is_there} beside the noise.\nUse {wanted} for it."
      )
    self.vae_config, vae_params = vae
    text_config, text_params = text_encoder
    first = SingleDeviceSharding(self._devices[0])
    self._text_params = residence.put(text_params, first, offload)
    self.settings = settings or Settings()
    self.progress = progress or Progress()
    self._tokenizer = tokenizer
    self._schedule = noise_schedule(noise)
    self._place = spread(1, self._devices).everywhere
    compute = compute_dtype(dtype)
    self._graphdef = graph_of(DiT, self.config, dtype=compute)
    self._text_graphdef = graph_of(T5Encoder, text_config, dtype=compute)
    self._vae_graphdef = graph_of(VAE, self.vae_config)
    floats = jax.tree.map(partial(np.asarray, dtype=np.float32), tensors.materialize(vae_params))
    self._vae_params = residence.put(floats, self._place, offload)
    self._tiling: Tiling | None = None
    self._slicing = False

  @classmethod
  def from_pretrained(
    cls,
    model: epath.PathLike,
    *,
    dtype: str = "auto",
    progress: Progress | None = None,
    offload: bool = False,
  ) -> "Pipeline":
    """A pipeline of a shipped name (`tiny`) or of a model folder in diffusers' layout.

    The other arguments are those of `Pipeline`.

    Raises:
      UserError: there is no such model, or a part of it is missing or damaged.
    """
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

  def __call__(
    self,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
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
  ) -> VideoOutput:
    """Makes num_videos_per_prompt videos of each prompt.

    Names and defaults are those of diffusers' `CogVideoXPipeline`, but for `seed`, which replaces
    `generator`, and what follows the star. `settings` holds what the model was made for.

    Args:
      prompt: one or several. One that is longer than the model's text is cut with a warning.
      negative_prompt: what to move away from, one for all prompts or one each. By default what
        stood for a dropped caption in training: zeros, or the encoded empty prompt.
      height: pixels, as width; by default those of the model's config, as num_frames.
      num_frames: of the form 4k + 1. The reference VAE decodes an odd k to 4k + 4 frames.
      num_inference_steps: up to the steps of the noise schedule, usually 1000.
      timesteps, generator: refused; diffusers' schedulers of CogVideoX take no timesteps either,
        and torch's random numbers cannot be drawn here.
      guidance_scale: up to 1 there is no guidance, and half the work.
      use_dynamic_cfg: lets the scale change from step to step: True, or "wave", as the published
        samplers do; "ramp", as they meant to.
      eta: changes nothing, as in diffusers.
      latents: initial noise of all videos, in place of drawn noise.
      prompt_embeds: text states in place of prompt; negative_prompt_embeds likewise.
      output_type: pil, np, uint8 or latent; see VideoOutput.
      return_dict: taken for diffusers' sake; what is returned is a tuple in any case.
      attention_kwargs: {"scale": x} multiplies the weights of all adapters by x for this call.
      callback_on_step_end: called as f(pipe, step, timestep, arrays) after each step of each batch.
        Arrays of those names that it returns replace the loop's own. Adapters that it sets count
        from the next call on.
      callback_on_step_end_tensor_inputs: which arrays it is given: latents, prompt_embeds,
        negative_prompt_embeds.
      max_sequence_length: text tokens; by default the model's. Others are for rotary models only.
      seed: in [0, 2**32), one for all prompts or one each. Video k of a prompt depends on the
        prompt, the seed and k, not on what else is in the call.
      solver: ddim or dpm; by default the model's.
      batch_size: how many videos to make at once; by default all.
      draws: replaces drawn noise; see `inputs.Draws`.

    Raises:
      UserError: an argument is out of its range; before anything is compiled.
    """
    size = self._size(num_frames, height, width)
    arguments = inputs.from_call(locals())
    job = self._job(size, arguments, self._solver(arguments))
    return self._output(job, self._denoise(job, self._initial_noise(job)))

  @property
  def default_size(self) -> Size:
    """The size that the transformer was made for (its config's `sample_*`)."""
    scale, config = self.vae_config.spatial_compression, self.config
    return Size(config.sample_frames, config.sample_height * scale, config.sample_width * scale)

  def enable_slicing(self, enabled: bool = True) -> None:
    """Has the VAE decode one video at a time, whatever the batch: less memory, the same frames."""
    self._slicing = enabled

  def enable_tiling(self, enabled: bool = True) -> None:
    """Has the VAE take videos larger than half its sample size in overlapping tiles."""
    self._tiling = self.vae_config.tiling if enabled else None

  def enable_model_cpu_offload(self) -> None:
    """Has all parameters wait in the host's memory for their turn, as `offload` of `Pipeline` does.

    Which spares the devices from now on; to load a model that they cannot hold, say it there.
    """
    parts = self._params, self._base, self._text_params, self._vae_params
    self._params, self._base, self._text_params, self._vae_params = residence.to_host(parts)

  @contextmanager
  def _turn(self, phase: str, params: Params) -> Iterator[Params]:
    """Has a part's parameters on the devices for a phase (of out_of_memory.REMEDIES)."""
    remedies = {
      out_of_memory.OFFLOAD: residence.rests_on_host(params),
      out_of_memory.TILING: self._tiling is not None,
    }
    in_use = [remedy for remedy, used in remedies.items() if used]
    with out_of_memory.explained(phase, in_use), residence.on_devices(params) as there:
      yield there

  def _size(self, *given: int | None) -> Size:
    """The size asked for, num_frames, height and width, checked; the model's where it is None."""
    pairs = zip(given, self.default_size, strict=True)
    size = Size(*(default if value is None else value for value, default in pairs))
    inputs.check_size(size, self.vae_config, self.config.patch)
    if self.config.learned_positions and size != self.default_size:
      raise UserError(
        f"This transformer has learned positions, which fix its videos to "
        f"{self.default_size.text}; {size.text} cannot be made."
      )
    return size

  def _solver(self, arguments: Arguments, start: int = 0) -> solvers.Solver:
    name = arguments.solver or self.settings.solver
    inputs.check_choice("solver", name, SOLVERS)
    return SOLVERS[name](self._schedule, arguments.num_inference_steps, start)

  def _job(self, size: Size, arguments: Arguments, path: solvers.Solver, steps: int = 0) -> Job:
    """Checks what all kinds of calls share. steps: of which dynamic guidance is reckoned."""
    inputs.check_choice("output_type", arguments.output_type, OUTPUT_TYPES)
    inputs.check_callback(arguments)
    inputs.check_refused(arguments)
    length = inputs.text_length(arguments, self.config)
    scales = guidance.scales(
      arguments.use_dynamic_cfg,
      float(arguments.guidance_scale),
      path.timesteps,
      steps or arguments.num_inference_steps,
    )
    halves = [inputs.condition("prompt", arguments.prompt, arguments.prompt_embeds)]
    if arguments.guidance_scale > 1:
      halves.insert(0, self._negative(arguments, len(halves[0]), length))
    self._check_conditions(halves, length)
    count = arguments.num_videos_per_prompt
    videos = inputs.plan_videos(arguments.seed, len(halves[0]), count)
    shape, extra = inputs.latent_shape(size, self.config, self.vae_config)
    if arguments.latents is not None:
      inputs.check_shape("latents", arguments.latents, (len(videos.seeds), *shape))
    places = inputs.chunks(len(videos.seeds), arguments.batch_size)
    chunks = [videos.take(chunk) for chunk in places]
    return Job(arguments, halves, length, videos, chunks, solver_steps(path, scales), shape, extra)

  def _initial_noise(self, job: Job) -> list[Array]:
    """Of each chunk."""
    given = job.arguments.latents
    if given is None:
      return [job.noise(chunk, INITIAL, job.shape) for chunk in job.chunks]
    return [jnp.asarray(given[chunk.places], jnp.float32) for chunk in job.chunks]

  def _latents_of(self, job: Job, given: Float[np.ndarray, "prompts F H W 3"]) -> list[Array]:
    """Latents, not scaled, of each prompt's image or video, for the videos of each chunk."""
    latents = []
    with self._turn(out_of_memory.GIVEN, self._vae_params) as params:
      vae = nnx.merge(self._vae_graphdef, params)
      for chunk in job.chunks:
        mean, logvar = encode(vae, jnp.asarray(given[chunk.prompts]), tiling=self._tiling)
        noise = job.noise(chunk, POSTERIOR, mean.shape[1:])
        latents.append(sample_posterior(mean, logvar, noise))
      return jax.block_until_ready(latents)

  def _negative(self, arguments: Arguments, count: int, length: int) -> Condition:
    """What each of `count` prompts, of `length` tokens, moves away from."""
    prompt, embeds = arguments.negative_prompt, arguments.negative_prompt_embeds
    if prompt is None and embeds is None:
      if self.settings.text_drop == "zeros":
        return np.zeros((count, length, self.config.text_width), np.float32)
      prompt = ""
    negative = inputs.condition("negative_prompt", prompt, embeds)
    if isinstance(negative, list) and len(negative) == 1:
      negative = negative * count
    if len(negative) != count:
      raise UserError(
        f"{len(negative)} negative prompts for {count} prompts: pass one, or one for each prompt."
      )
    return negative

  def _check_conditions(self, halves: list[Condition], length: int) -> None:
    for half in halves:
      if not isinstance(half, list):
        shape = (len(half), length, self.config.text_width)
        inputs.check_shape("prompt_embeds", half, shape)

  def _encode(self, job: Job) -> Float[Array, "halves b l t"]:
    """Text states of each half of guidance. A prompt that stands twice is encoded once."""
    halves = job.halves
    prompts = list(dict.fromkeys(p for half in halves if isinstance(half, list) for p in half))
    table = {}
    if prompts:
      if self._tokenizer is None:
        raise UserError("There is no tokenizer: pass prompt_embeds and negative_prompt_embeds.")
      ids = self._tokenizer.encode(prompts, job.text_length)
      chunks = inputs.chunks(len(prompts), job.arguments.batch_size)
      with (
        self.progress.phase("encode", len(chunks)) as bar,
        self._turn(out_of_memory.TEXT, self._text_params) as params,
      ):
        for chunk in chunks:
          states = encode_text(params, ids[chunk], graphdef=self._text_graphdef)
          table.update(zip((prompts[i] for i in chunk), jax.block_until_ready(states), strict=True))
          bar.update()
    texts = [jnp.stack([table[p] for p in h]) if isinstance(h, list) else h for h in halves]
    return jnp.stack(jax.device_put(texts, self._place))  # Given states may lie elsewhere.

  def _denoise(
    self, job: Job, start: list[Array], images: list[Array] | None = None
  ) -> Float[Array, "b f h w c"]:
    """Takes the start of each chunk of videos [chunk f h w c] to the latents of all.

    images: latents that the network sees beside the noise, of each chunk.
    """
    text = self._encode(job)
    texts = [text[:, chunk.prompts] for chunk in job.chunks]
    start, texts, seen = jax.device_put((start, texts, images or [None] * len(start)), self._place)
    with (
      self._scaled((job.arguments.attention_kwargs or {}).get("scale", 1.0)),
      self._turn(out_of_memory.DENOISE, self._params) as params,
    ):
      return self._run(params, job, start, texts, seen)

  def _run(
    self,
    params: Params,
    job: Job,
    start: list[Array],
    texts: list[Array],
    seen: list[Array | None],
  ) -> Float[Array, "b f h w c"]:
    """Compiles one step, and takes them all for each chunk."""
    rows = texts[0].shape[0] * texts[0].shape[1]
    denoise_step = jit_step(self._devices[0])
    fixed = {
      "graphdef": self._graphdef,
      "config": self.config,
      "spread": spread(rows, self._devices),
    }
    with self.progress.phase(COMPILE) as bar:
      x = start[0]
      arrays = x, x, x, texts[0], seen[0]
      denoise_step.lower(params, *arrays, job.steps[0], **fixed).compile()
      bar.update()

    def run(*arguments):
      # New noise, and what a callback gives, may lie elsewhere.
      *arrays, step = arguments
      return denoise_step(params, *jax.device_put(arrays, self._place), step, **fixed)

    with self.progress.phase("denoise", len(job.chunks) * len(job.steps)) as bar:

      def on_step(index: int, x: Array, text: Array) -> tuple[Array, Array]:
        bar.update()
        timestep = int(job.steps[index].timestep)
        return inputs.call_back(self, job.arguments, index, timestep, x, text)

      latents = [
        denoise(run, x, text, image, job.steps, partial(job.noise, chunk), on_step)
        for x, text, image, chunk in zip(start, texts, seen, job.chunks, strict=True)
      ]
    return jnp.concatenate(latents)[: len(job.videos.seeds)]

  def _output(self, job: Job, latents: Float[Array, "b f h w c"]) -> VideoOutput:
    if job.arguments.output_type == "latent":
      return VideoOutput(np.asarray(latents))
    frames = self._decode(latents[:, job.extra :], job.arguments.batch_size)
    return VideoOutput(as_output(frames, job.arguments.output_type))

  def _decode(
    self, latents: Float[Array, "b f h w c"], batch_size: int | None
  ) -> Float32[np.ndarray, "b F H W 3"]:
    """Frames in [0, 1], on the host."""
    chunks = inputs.chunks(len(latents), 1 if self._slicing else batch_size)
    videos = []
    with (
      self.progress.phase("decode", len(chunks)) as bar,
      self._turn(out_of_memory.DECODE, self._vae_params) as params,
    ):
      vae = nnx.merge(self._vae_graphdef, params)
      for chunk in chunks:
        z = latents[chunk] / self.vae_config.scaling_factor
        frames = decode(vae, z, tiling=self._tiling)
        videos.append(np.asarray(jnp.clip(frames / 2 + 0.5, 0, 1)))
        bar.update()
    return np.concatenate(videos)[: len(latents)]
