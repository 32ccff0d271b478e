"""What a call asks for, checked before anything is compiled."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.vae_config import VAEConfig

MAX_SEED = 2**32 - 1

Embeds = Float[Array | np.ndarray, "b l t"]
Condition = list[str] | Embeds  # Prompts, or their text states.


class Size(NamedTuple):
  """A video's size in pixels."""

  num_frames: int
  height: int
  width: int

  @property
  def text(self) -> str:
    return f"{self.num_frames} frames of {self.width}x{self.height}"


class Videos(NamedTuple):
  """Each video of a call, or of a chunk of it."""

  places: Int[np.ndarray, "b"]  # Where it stands in the call.
  prompts: Int[np.ndarray, "b"]  # Which prompt it shows.
  indices: UInt32[np.ndarray, "b"]  # Which of that prompt's videos it is.
  seeds: UInt32[np.ndarray, "b"]

  def take(self, places: Int[np.ndarray, "chunk"]) -> "Videos":
    return Videos(*(part[places] for part in self))


# Noise in place of what seeds give: (videos, draw, shape) -> standard normal [b *shape]. `draw` is
# denoising.INITIAL, POSTERIOR, or the number of a solver's step, from 1.
Draws = Callable[[Videos, int, tuple[int, ...]], Float[Array | np.ndarray, "b ..."]]
CALLBACK_ARRAYS = ("latents", "prompt_embeds", "negative_prompt_embeds")


@dataclasses.dataclass(frozen=True)
class Arguments:
  """What all kinds of calls are given alike; `Pipeline.__call__` says what each means."""

  prompt: str | Sequence[str] | None
  negative_prompt: str | Sequence[str] | None
  num_inference_steps: int
  timesteps: Sequence[int] | None
  guidance_scale: float | int
  use_dynamic_cfg: bool | str
  num_videos_per_prompt: int
  generator: object
  latents: Float[Array | np.ndarray, "b f h w c"] | None
  prompt_embeds: Embeds | None
  negative_prompt_embeds: Embeds | None
  output_type: str
  attention_kwargs: Mapping[str, Any] | None
  callback_on_step_end: Callable[..., dict[str, Array]] | None
  callback_on_step_end_tensor_inputs: Sequence[str]
  max_sequence_length: int | None
  seed: int | Sequence[int]
  solver: str | None
  batch_size: int | None
  draws: Draws | None


def from_call(given: Mapping[str, Any]) -> Arguments:
  """Of the local names at the beginning of a call."""
  return Arguments(**{field.name: given[field.name] for field in dataclasses.fields(Arguments)})


def check_refused(arguments: Arguments) -> None:
  """Raises UserError for what diffusers has arguments for and cannot be done here, and why."""
  if arguments.timesteps is not None:
    raise UserError(
      "timesteps cannot be given: CogVideoX's schedulers have none but their own.\n"
      "Pass num_inference_steps."
    )
  if arguments.generator is not None:
    raise UserError(
      "generator cannot be given: torch's random numbers are not drawn here.\n"
      "Pass seed=, one for all prompts or one each; or the noise itself as latents."
    )
  if unknown := set(arguments.attention_kwargs or {}) - {"scale"}:
    raise UserError(f"attention_kwargs has {sorted(unknown)[0]!r}; only 'scale' is known.")


def text_length(arguments: Arguments, model: DiTConfig) -> int:
  """The tokens of each prompt.

  Raises:
    UserError: the model has positions for another number.
  """
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


def check_callback(arguments: Arguments) -> None:
  """Raises UserError if the callback asks for an array that there is not."""
  for name in arguments.callback_on_step_end_tensor_inputs:
    check_choice("callback_on_step_end_tensor_inputs", name, CALLBACK_ARRAYS)


def call_back(
  pipe: Any, arguments: Arguments, step: int, timestep: int, latents: Array, text: Array
) -> tuple[Array, Array]:
  """Calls the caller's callback_on_step_end, if there is one, with the arrays that it asks for.

  text: [halves b l t], negative prompts first if there are any.

  Returns:
    Latents and text to go on with: what the callback returned of them, or those it was given.
  """
  if arguments.callback_on_step_end is None:
    return latents, text
  arrays = {"latents": latents, "prompt_embeds": text[-1], "negative_prompt_embeds": text[0]}
  wanted = {name: arrays[name] for name in arguments.callback_on_step_end_tensor_inputs}
  arrays |= arguments.callback_on_step_end(pipe, step, timestep, wanted) or {}
  halves = [arrays["negative_prompt_embeds"], arrays["prompt_embeds"]][-len(text) :]
  return jnp.asarray(arrays["latents"]), jnp.stack(halves)


def check_size(size: Size, vae: VAEConfig, patch: Sequence[int] = (1, 1, 1)) -> None:
  """Raises UserError for a size that the VAE, and the transformer's patches, cannot hold."""
  step = vae.temporal_compression
  frames = size.num_frames
  if frames < 1 or (frames - 1) % step:
    lower = max(frames - 1, 0) // step * step + 1
    raise UserError(
      f"num_frames={frames}: the VAE keeps the first frame and compresses the others {step} at a "
      f"time,\nso it must be {step}k + 1. The nearest are {lower} and {lower + step}."
    )
  for name, side in (("height", patch[1]), ("width", patch[2])):
    value, multiple = getattr(size, name), vae.spatial_compression * side
    if value < multiple or value % multiple:
      lower = max(value // multiple, 1) * multiple
      times = f" times the patch's {side}" if side > 1 else ""
      raise UserError(
        f"{name}={value}: must be a multiple of {multiple} pixels (the VAE's "
        f"{vae.spatial_compression}{times}).\n"
        f"The nearest are {lower} and {lower + multiple}."
      )


def latent_shape(size: Size, model: DiTConfig, vae: VAEConfig) -> tuple[tuple[int, ...], int]:
  """Shape (f, h, w, c) of a video's latents, and how many of f are extra.

  A temporal patch (CogVideoX 1.5) needs a whole number of latent frames. The extra ones stand in
  front, and are dropped before decoding, as in diffusers.
  """
  frames = (size.num_frames - 1) // vae.temporal_compression + 1
  extra = -frames % model.patch[0]
  scale = vae.spatial_compression
  shape = (frames + extra, size.height // scale, size.width // scale, model.out_channels)
  return shape, extra


def condition(name: str, prompt: str | Sequence[str] | None, embeds: Embeds | None) -> Condition:
  """The prompts of an argument as a list, or the text states given in their place."""
  if prompt is None and embeds is not None:
    return embeds
  if prompt is None or embeds is not None:
    raise UserError(f"Pass either {name} or {name}_embeds.")
  prompts = [prompt] if isinstance(prompt, str) else list(prompt)
  if not prompts:
    raise UserError(f"{name} is an empty list: pass at least one.")
  return prompts


def plan_videos(seed: int | Sequence[int], prompts: int, videos_per_prompt: int) -> Videos:
  """The videos of a call, those of a prompt side by side."""
  if videos_per_prompt < 1:
    raise UserError(f"num_videos_per_prompt={videos_per_prompt}: must be at least 1.")
  seeds = [seed] * prompts if isinstance(seed, int) else list(seed)
  if len(seeds) != prompts:
    raise UserError(f"{len(seeds)} seeds for {prompts} prompts: pass one, or one for each prompt.")
  for each in seeds:
    if not 0 <= each <= MAX_SEED:
      raise UserError(f"seed={each}: must be from 0 to {MAX_SEED}.")
  return Videos(
    places=np.arange(prompts * videos_per_prompt),
    prompts=np.repeat(np.arange(prompts), videos_per_prompt),
    indices=np.tile(np.arange(videos_per_prompt, dtype=np.uint32), prompts),
    seeds=np.repeat(np.array(seeds, np.uint32), videos_per_prompt),
  )


def chunks(count: int, size: int | None) -> list[Int[np.ndarray, "size"]]:
  """Places 0 to count - 1 in chunks of one size, so that one program runs them all.

  The last chunk is filled up with the last place. size: None means all at once.
  """
  if size is not None and size < 1:
    raise UserError(f"batch_size={size}: must be at least 1.")
  size = min(size or count, count)
  return [np.minimum(np.arange(i, i + size), count - 1) for i in range(0, count, size)]


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
  """Raises UserError for a value that is not one of the choices."""
  if value not in choices:
    raise UserError(f"{name}={value!r}: must be one of {', '.join(choices)}.")


def check_shape(name: str, array: Array | np.ndarray, shape: tuple[int, ...]) -> None:
  """Raises UserError unless an array that the user passed has the shape the call needs."""
  if array.shape != shape:
    raise UserError(f"{name} has shape {tuple(array.shape)}; this call needs {shape}.")
