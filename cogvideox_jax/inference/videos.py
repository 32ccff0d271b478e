"""The videos that a call makes: which prompt and seed each has, and which are made together."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt32

from cogvideox_jax.errors import UserError

MAX_SEED = 2**32 - 1


class Videos(NamedTuple):
  """The videos of a call, or of a chunk of it."""

  slots: Int[np.ndarray, "b"]  # The video's index in the call.
  prompts: Int[np.ndarray, "b"]  # The index of its prompt.
  indices: UInt32[np.ndarray, "b"]  # Its index among the videos of that prompt.
  seeds: UInt32[np.ndarray, "b"]

  def take(self, slots: Int[np.ndarray, "chunk"]) -> "Videos":
    return Videos(*(field[slots] for field in self))


def plan_videos(seed: int | Sequence[int], prompts: int, videos_per_prompt: int) -> Videos:
  """Lists the videos of a call; those of one prompt are neighbours.

  Args:
    seed: one for all prompts, or one for each.
    prompts: how many there are.

  Raises:
    UserError: a seed is out of range, or there are too few or too many; videos_per_prompt < 1.
  """
  if videos_per_prompt < 1:
    raise UserError(f"num_videos_per_prompt={videos_per_prompt}: must be at least 1.")
  seeds = [seed] * prompts if isinstance(seed, int) else list(seed)
  if len(seeds) != prompts:
    raise UserError(f"{len(seeds)} seeds for {prompts} prompts: pass one, or one for each prompt.")
  for each in seeds:
    if not 0 <= each <= MAX_SEED:
      raise UserError(f"seed={each}: must be from 0 to {MAX_SEED}.")
  return Videos(
    slots=np.arange(prompts * videos_per_prompt),
    prompts=np.repeat(np.arange(prompts), videos_per_prompt),
    indices=np.tile(np.arange(videos_per_prompt, dtype=np.uint32), prompts),
    seeds=np.repeat(np.array(seeds, np.uint32), videos_per_prompt),
  )


def chunks(count: int, size: int | None) -> list[Int[np.ndarray, "size"]]:
  """Splits the indices 0 to count - 1 in chunks of one size, so that one program serves them all.

  The last chunk is filled up with the last index.

  Args:
    size: indices in a chunk; None puts all in one.

  Raises:
    UserError: size < 1.
  """
  if size is not None and size < 1:
    raise UserError(f"batch_size={size}: must be at least 1.")
  size = min(size or count, count)
  return [np.minimum(np.arange(i, i + size), count - 1) for i in range(0, count, size)]
