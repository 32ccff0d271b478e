"""The text encoder's phase of sampling: prompts become text states."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference import out_of_memory
from cogvideox_jax.inference.offload import loaded_for, put
from cogvideox_jax.inference.progress import Progress
from cogvideox_jax.inference.request import Request
from cogvideox_jax.inference.videos import chunks
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.t5 import T5Config, T5Encoder, encode_text
from cogvideox_jax.types import Params


class PromptEncoder:
  """T5 with its parameters, and the tokenizer."""

  def __init__(
    self,
    text_encoder: tuple[T5Config, Params],
    tokenizer: Tokenizer | None,
    *,
    dtype: DTypeLike,
    sharding: Sharding,
    on_host: bool,
  ):
    """Puts the parameters in the memory of the sharding's devices, or in that of their host."""
    config, params = text_encoder
    self.params = put(params, sharding, on_host)
    self.tokenizer = tokenizer
    self._graphdef = graph_of(T5Encoder, config, dtype=dtype)

  def encode(
    self, request: Request, progress: Progress, sharding: Sharding
  ) -> Float[Array, "halves prompts l t"]:
    """Returns the text states of each half of guidance, in a sharding.

    A prompt that occurs twice is encoded once.
    """
    halves = request.halves
    prompts = list(dict.fromkeys(p for half in halves if isinstance(half, list) for p in half))
    states = self._states(prompts, request, progress) if prompts else {}
    text = [jnp.stack([states[p] for p in h]) if isinstance(h, list) else h for h in halves]
    # The caller's text states may be on other devices.
    return jnp.stack(jax.device_put(text, sharding))

  def _states(
    self, prompts: Sequence[str], request: Request, progress: Progress
  ) -> dict[str, Float[Array, "l t"]]:
    """The text states of each prompt."""
    if self.tokenizer is None:
      raise UserError("There is no tokenizer: pass prompt_embeds and negative_prompt_embeds.")
    ids = self.tokenizer.encode(prompts, request.text_tokens)
    batches = chunks(len(prompts), request.arguments.batch_size)
    states = {}
    with (
      progress.phase("encode", len(batches)) as bar,
      loaded_for(out_of_memory.TEXT, self.params) as params,
    ):
      for batch in batches:
        encoded = jax.block_until_ready(encode_text(params, ids[batch], graphdef=self._graphdef))
        states.update(zip((prompts[i] for i in batch), encoded, strict=True))
        bar.update()
    return states
