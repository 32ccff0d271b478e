"""The caller's function that runs after each denoising step and may change its arrays."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

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
  arrays = {"latents": latents, "prompt_embeds": text[-1], "negative_prompt_embeds": text[0]}
  wanted = {name: arrays[name] for name in arguments.callback_on_step_end_tensor_inputs}
  arrays |= arguments.callback_on_step_end(pipe, step, timestep, wanted) or {}
  halves = [arrays["negative_prompt_embeds"], arrays["prompt_embeds"]][-len(text) :]
  return jnp.asarray(arrays["latents"]), jnp.stack(halves)
