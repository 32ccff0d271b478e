"""A call whose arguments were checked, before anything is compiled."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cogvideox_jax.conversion.folder import Settings
from cogvideox_jax.diffusion import guidance
from cogvideox_jax.diffusion.noise import NoiseSchedule
from cogvideox_jax.diffusion.solvers import SOLVERS
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference import calls_of_diffusers
from cogvideox_jax.inference.arguments import CallArguments, Embeds
from cogvideox_jax.inference.callback import check_callback
from cogvideox_jax.inference.checks import check_choice, check_finite, check_shape
from cogvideox_jax.inference.denoising import Step, solver_steps
from cogvideox_jax.inference.noise_draws import INITIAL, draw_for
from cogvideox_jax.inference.output import OUTPUT_TYPES
from cogvideox_jax.inference.size import Size, check_size, default_size, latent_shape
from cogvideox_jax.inference.videos import Videos, chunks, plan_videos
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.vae_config import VAEConfig

Condition = list[str] | Embeds  # Prompts, or their text states.


class SampledModel(NamedTuple):
  """What requests are checked against."""

  transformer: DiTConfig
  vae: VAEConfig
  schedule: NoiseSchedule
  settings: Settings


class Request(NamedTuple):
  """What a call asks for."""

  arguments: CallArguments
  size: Size
  halves: list[Condition]  # Negative and positive prompts; only positive without guidance.
  text_tokens: int  # Tokens of each prompt.
  videos: Videos
  chunks: list[Videos]  # The videos that are made together.
  steps: list[Step]
  latent_shape: tuple[int, ...]  # One video's: (f, h, w, c).
  extra_frames: int  # Latent frames that are dropped from the front before decoding.

  @property
  def num_prompts(self) -> int:
    return len(self.halves[-1])

  def draw(self, chunk: Videos, draw: int, shape: tuple[int, ...]) -> Array:
    """Draws standard normal numbers by each video's seed, or asks the caller's `draws`."""
    return jnp.asarray((self.arguments.draws or draw_for)(chunk, draw, shape), jnp.float32)

  def initial_latents(self) -> list[Array]:
    """The latents that each chunk starts from: the caller's, else noise."""
    given = self.arguments.latents
    if given is None:
      return [self.draw(chunk, INITIAL, self.latent_shape) for chunk in self.chunks]
    return [jnp.asarray(given[chunk.slots], jnp.float32) for chunk in self.chunks]


def make_request(
  model: SampledModel,
  arguments: CallArguments,
  num_frames: int | None,
  last_steps: int | None = None,
) -> Request:
  """Checks what all pipelines have in common.

  Args:
    num_frames: by default the model's.
    last_steps: how many of the last steps are taken; by default all.

  Raises:
    UserError: an argument is out of its range.
  """
  size = _size(model, num_frames, arguments)
  steps = _steps(model, arguments, last_steps)
  check_choice("output_type", arguments.output_type, OUTPUT_TYPES)
  check_callback(arguments)
  _check_refused(arguments)
  text_tokens = _text_tokens(arguments, model.transformer)
  halves = _halves(model, arguments, text_tokens)
  videos = plan_videos(_seeds(arguments), len(halves[-1]), arguments.num_videos_per_prompt)
  shape, extra_frames = latent_shape(size, model.transformer, model.vae)
  if arguments.latents is not None:
    check_shape("latents", arguments.latents, (len(videos.seeds), *shape))
    check_finite("latents", arguments.latents, "Pass others, or leave them out.")
  slots = chunks(len(videos.seeds), arguments.batch_size)
  return Request(
    arguments=arguments,
    size=size,
    halves=halves,
    text_tokens=text_tokens,
    videos=videos,
    chunks=[videos.take(chunk) for chunk in slots],
    steps=steps,
    latent_shape=shape,
    extra_frames=extra_frames,
  )


def _size(model: SampledModel, num_frames: int | None, arguments: CallArguments) -> Size:
  """The size asked for; the model's where it is None."""
  default = default_size(model.transformer, model.vae)
  given = num_frames, arguments.height, arguments.width
  pairs = zip(given, default, strict=True)
  size = Size(*(other if value is None else value for value, other in pairs))
  check_size(size, model.vae, model.transformer.patch)
  if model.transformer.learned_positions and size != default:
    raise UserError(
      f"This transformer has learned positions, which fix its videos to "
      f"{default.text}; {size.text} cannot be made."
    )
  return size


def _steps(model: SampledModel, arguments: CallArguments, last_steps: int | None) -> list[Step]:
  """The solver's steps with their guidance scales."""
  name = arguments.solver or model.settings.solver
  check_choice("solver", name, SOLVERS)
  steps = arguments.num_inference_steps if last_steps is None else last_steps
  start = arguments.num_inference_steps - steps
  solver = SOLVERS[name](model.schedule, arguments.num_inference_steps, start)
  scale = float(arguments.guidance_scale)
  if not math.isfinite(scale):
    raise UserError(f"guidance_scale={scale}: must be a finite number, such as 6.")
  scales = guidance.scales(arguments.use_dynamic_cfg, scale, solver.timesteps, steps)
  return solver_steps(solver, scales)


def _check_refused(arguments: CallArguments) -> None:
  """Raises UserError for arguments of diffusers' that have no counterpart here."""
  if arguments.timesteps is not None:
    raise UserError(
      "timesteps cannot be given: CogVideoX's schedulers have none but their own.\n"
      "Pass num_inference_steps."
    )
  if unknown := set(arguments.attention_kwargs or {}) - {"scale"}:
    raise UserError(f"attention_kwargs has {sorted(unknown)[0]!r}; only 'scale' is known.")


def _seeds(arguments: CallArguments) -> int | Sequence[int]:
  """The seeds of the call: `seed`, or those that a generator was given."""
  if arguments.generator is None:
    return arguments.seed
  if arguments.seed != 0:
    raise UserError("Pass either seed or generator.")
  return calls_of_diffusers.seeds_of(arguments.generator)


def _text_tokens(arguments: CallArguments, model: DiTConfig) -> int:
  """The tokens of each prompt; UserError if the model has positions for another number."""
  length = model.text_length
  if arguments.max_sequence_length is not None:
    length = arguments.max_sequence_length
  if length < 1:
    raise UserError(f"max_sequence_length={length}: must be at least 1.")
  if length != model.text_length and (model.positions == "sincos" or model.learned_positions):
    raise UserError(
      f"max_sequence_length={length}: this transformer's positions are for {model.text_length} "
      "text tokens."
    )
  return length


def _halves(model: SampledModel, arguments: CallArguments, text_tokens: int) -> list[Condition]:
  """The negative prompts, if the call is guided, and the positive ones."""
  halves = [_condition("prompt", arguments.prompt, arguments.prompt_embeds)]
  if arguments.guidance_scale > 1:
    halves.insert(0, _negative(model, arguments, len(halves[0]), text_tokens))
  for half in halves:
    if not isinstance(half, list):
      shape = (len(half), text_tokens, model.transformer.text_width)
      check_shape("prompt_embeds", half, shape)
      check_finite("prompt_embeds or negative_prompt_embeds", half, "Encode the prompts anew.")
  return halves


def _negative(
  model: SampledModel, arguments: CallArguments, prompts: int, text_tokens: int
) -> Condition:
  """What each of so many prompts moves away from."""
  prompt, embeds = arguments.negative_prompt, arguments.negative_prompt_embeds
  if prompt is None and embeds is None:
    if model.settings.text_drop == "zeros":
      return np.zeros((prompts, text_tokens, model.transformer.text_width), np.float32)
    prompt = ""
  negative = _condition("negative_prompt", prompt, embeds)
  if isinstance(negative, list) and len(negative) == 1:
    negative = negative * prompts
  if len(negative) != prompts:
    raise UserError(
      f"{len(negative)} negative prompts for {prompts} prompts: pass one, or one for each prompt."
    )
  return negative


def _condition(name: str, prompt: str | Sequence[str] | None, embeds: Embeds | None) -> Condition:
  """The prompts of an argument as a list, or the text states given in their place."""
  if prompt is None and embeds is not None:
    return embeds
  if prompt is None or embeds is not None:
    raise UserError(f"Pass either {name} or {name}_embeds.")
  prompts = [prompt] if isinstance(prompt, str) else list(prompt)
  if not prompts:
    raise UserError(f"{name} is an empty list: pass at least one.")
  return prompts
