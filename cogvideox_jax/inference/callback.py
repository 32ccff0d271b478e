"""The caller's function that runs after each denoising step and may change its arrays."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from cogvideox_jax.errors import UserError
from cogvideox_jax.inference.arguments import CallArguments
from cogvideox_jax.inference.checks import check_choice

ARRAYS = ("latents", "prompt_embeds", "negative_prompt_embeds")


def check_callback(arguments: CallArguments) -> None:
  """Raises UserError if the callback asks for an array that does not exist."""
  for name in arguments.callback_on_step_end_tensor_inputs:
    check_choice("callback_on_step_end_tensor_inputs", name, ARRAYS)


def call_back(
  pipe: Any, arguments: CallArguments, step: int, timestep: int, latents: Array, text: Array
) -> tuple[Array, Array]:
  """Calls `callback_on_step_end`, if there is one, with the arrays that it asks for.

  Args:
    pipe: the pipeline, which the callback is given.
    latents: [b f h w c].
    text: [halves b l t], negative prompts first if there are any.

  Returns:
    The latents and text to go on with: those that the callback returned, else those given.
  """
  if arguments.callback_on_step_end is None:
    return latents, text
  joined = jnp.concatenate(list(text))
  arrays = {"latents": latents, "prompt_embeds": joined, "negative_prompt_embeds": text[0]}
  wanted = {name: arrays[name] for name in arguments.callback_on_step_end_tensor_inputs}
  returned = arguments.callback_on_step_end(pipe, step, timestep, wanted) or {}
  latents = jnp.asarray(returned.get("latents", latents))
  if "prompt_embeds" in returned:
    text = _replaced(text, jnp.asarray(returned["prompt_embeds"]))
  if "negative_prompt_embeds" in returned and len(text) > 1:
    text = jnp.stack([jnp.asarray(returned["negative_prompt_embeds"]), text[-1]])
  return latents, text


def _replaced(text: Array, embeds: Array) -> Array:
  """The text [halves b l t] with the given states: of all halves, or of the positive prompts."""
  halves, videos = text.shape[:2]
  if len(embeds) == halves * videos:
    return embeds.reshape(text.shape)
  if len(embeds) != videos:
    raise UserError(
      f"The callback returned prompt_embeds of {len(embeds)} prompts; there are {videos}, or "
      f"{halves * videos} with the negative ones. Guidance cannot be switched on or off in a call."
    )
  return jnp.concatenate([text[:-1], embeds[None]])
