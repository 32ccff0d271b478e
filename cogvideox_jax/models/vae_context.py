"""Frames of a clip that several devices share in time, and what the VAE's layers ask of others.

A clip of `1 + c k` frames, c the temporal compression, becomes slots: c copies of its first frame,
then the other frames. So each block of c slots gives one latent frame, and all blocks are alike.
The copies change no number: a causal convolution repeats the first frame by itself, so that it
gives the same on each copy, as do averages of pairs and repeats. Only norms must count the frame
once.

Each rank holds a run of blocks. The last ranks have fewer, or none; their slots are filled, and no
norm counts them, and no frame before them sees them.
"""

from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cogvideox_jax.errors import UserError
from cogvideox_jax.models.vae import PLANS
from cogvideox_jax.models.vae_layers import Carry, Frames


class Split(NamedTuple):
  """How the frames of a clip, and the chunks that norms average over, are split over ranks."""

  axes: tuple[str, ...]  # The mesh axes whose devices are the ranks.
  ranks: int
  compression: int  # Frames to a latent frame, c.
  ends: tuple[int, ...]  # Where each chunk ends, in latent frames.

  @property
  def latents(self) -> int:
    return self.ends[-1]

  @property
  def frames(self) -> int:
    """Pixel frames of the clip."""
    return self.compression * (self.latents - 1) + 1

  @property
  def blocks(self) -> int:
    """Blocks of each rank, one for each latent frame; filled ones included."""
    return -(-self.latents // self.ranks)

  def frame_of_slot(self) -> np.ndarray:
    """Returns which frame each slot of all ranks holds; those to be filled hold the last one."""
    slots = np.arange(self.ranks * self.blocks * self.compression)
    return np.clip(slots - self.compression + 1, 0, self.frames - 1)

  def chunk_of_slot(self, size: int) -> np.ndarray:
    """Returns ones where a slot is of a chunk, [ranks, slots of a rank, chunks].

    Args:
      size: slots of a block, c or less; fewer in the levels that are compressed.
    """
    block = np.arange(self.ranks * self.blocks * size) // size
    chunk = np.searchsorted(self.ends, np.minimum(block, self.latents - 1), side="right")
    return np.eye(len(self.ends), dtype=np.float32)[chunk].reshape(self.ranks, -1, len(self.ends))

  def counted(self, size: int) -> np.ndarray:
    """Returns ones where norms count a slot, [ranks, slots of a rank]; see `chunk_of_slot`."""
    slot = np.arange(self.ranks * self.blocks * size)
    counted = (slot >= size - 1) & (slot < self.latents * size)
    return counted.astype(np.float32).reshape(self.ranks, -1)


def split_encoding(
  frames: int, compression: int, plan: str, axes: tuple[str, ...], ranks: int
) -> Split:
  """Splits the encoding of so many pixel frames, in the chunks of a plan in `vae.PLANS`.

  Raises:
    UserError: a chunk is no whole number of latent frames, besides the clip's first frame.
  """
  ends = PLANS[plan].encode(frames)
  if ranks > 1 and any(end % compression != 1 % compression for end in ends):
    raise UserError(
      f"{frames} frames in chunks that end at {ends} cannot be shared by {ranks} devices:\neach "
      f"chunk must end after 1 + {compression}k frames."
    )
  latents = tuple((end - 1) // compression + 1 for end in ends)
  return Split(axes, ranks, compression, latents)


def split_decoding(
  latents: int, compression: int, plan: str, axes: tuple[str, ...], ranks: int
) -> Split:
  """Splits the decoding of so many latent frames, as `split_encoding`.

  Raises:
    UserError: a chunk but the first has an odd number of latent frames, or the first an even one.
  """
  ends = PLANS[plan].decode(latents)
  if ranks > 1 and any(end % 2 == 0 for end in ends):
    raise UserError(
      f"{latents} latent frames in chunks that end at {ends} cannot be shared by {ranks} devices:"
      "\neach chunk must end after an odd number of them."
    )
  return Split(axes, ranks, compression, tuple(ends))


class RankCarry(Carry):
  """What layers know of other frames on a rank that holds some blocks of a clip.

  For use inside `jax.shard_map`, over the axes of the split. Frames before the rank's own come from
  the ranks before it; norms sum over the ranks.
  """

  def __init__(self, split: Split):
    super().__init__(None)
    self._split = split

  @cached_property
  def _rank(self) -> Array:
    return jax.lax.axis_index(self._split.axes)

  def extend(self, x: Float[Array, "b f h w c"], count: int) -> Float[Array, "b f2 h w c"]:
    """Puts the `count` frames before x in front of it; on the first rank, repeats x's first."""
    axes, ranks = self._split.axes, self._split.ranks
    first = before = jnp.repeat(x[:, :1], count, axis=1)
    # Each pass brings frames one rank further; a rank may hold fewer than `count`.
    for _ in range(-(-count // x.shape[1])):
      last = jnp.concatenate([before, x[:, -count:]], axis=1)[:, -count:]
      sent = jax.lax.ppermute(last, axes, [(rank, rank + 1) for rank in range(ranks - 1)])
      before = jnp.where(self._rank == 0, first, sent)
    return jnp.concatenate([before, x], axis=1)

  def _branch(self, frames: Frames | None) -> "RankCarry":
    """Returns another carry of the same rank; `frames` is None, because none are kept."""
    return RankCarry(self._split)

  def mean(self, x: Float[Array, "b f h w groups c"]) -> Float[Array, "b f 1 1 groups 1"]:
    """Averages each group over its chunk, whose frames may be on several ranks."""
    size = x.shape[1] // self._split.blocks
    chunk_of_slot, counted = self._split.chunk_of_slot(size), self._split.counted(size)
    numbers = np.einsum("rsk,rs->k", chunk_of_slot, counted) * (x.size // (x.shape[0] * x.shape[1]))
    numbers = numbers / x.shape[4]
    member = jnp.asarray(chunk_of_slot)[self._rank][None, :, :, None]
    weight = member * jnp.asarray(counted)[self._rank][None, :, None, None]
    sums = (x.sum((2, 3, 5))[:, :, None] * weight).sum(1)
    means = jax.lax.psum(sums, self._split.axes) / numbers[None, :, None]
    return (means[:, None] * member).sum(2)[:, :, None, None, :, None]

  def alone(self, frames: int) -> int:
    """No frame stands alone, because there are as many copies of the first as it would have."""
    return 0
