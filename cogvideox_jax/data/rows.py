"""The endless rows of one dataset: which clips each holds, and the packed row itself.

Rows are numbered from 0 over all epochs, and a row belongs to one epoch. A row is a function of
(seed, dataset, number) and is planned from the index, without reading records.
"""

import functools
import threading
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Int

from cogvideox_jax.data import packing
from cogvideox_jax.data.clips import are_held_out
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.errors import UserError
from cogvideox_jax.types import Batch, Example

# The text states of a clip that loses its caption: zeros, or the given ones.
DroppedCaption: TypeAlias = Literal["zeros"] | Float[np.ndarray, "l t"]


class EmptySplitError(UserError):
  """A split of a dataset has no clip, or none that fits a row."""


class Row(NamedTuple):
  """The clips of a row."""

  epoch: int
  clips: Int[np.ndarray, " clips"]  # Their numbers in the dataset, in the order of segments.


class Plan(NamedTuple):
  """Everything that is drawn for one epoch."""

  number: int
  rows: packing.Epoch
  dropped: Bool[np.ndarray, " clips"]  # Which clips of the dataset lose their caption,
  captions: Int[np.ndarray, " clips"]  # and which of its captions each other clip has.


class Rows:
  """Packed rows of one split of an encoded dataset."""

  def __init__(
    self,
    dataset: Dataset,
    *,
    row_tokens: int,
    max_clips: int,  # The most clips of a row.
    patch: tuple[int, int, int],  # Latent frames, height, width.
    with_images: bool = False,  # Give each clip an image, which it must have.
    seed: int,
    drop: DroppedCaption,
    drop_rate: float,
    validation_fraction: float,  # The held-out fraction of the clips; a hash of sources chooses.
    best: float = 1.0,  # The fraction of the split's clips to keep: those with the highest scores.
    split: str = "train",  # "validation" has one order in all epochs and runs, and drops nothing.
  ):
    """Raises UserError if the dataset does not fit these numbers; see also `EmptySplitError`."""
    self.dataset, self.row_tokens, self.max_clips = dataset, row_tokens, max_clips
    self._patch, self._drop = patch, None if isinstance(drop, str) else drop
    self._with_images = with_images
    self._shuffled = split == "train"
    self._seed, self._drop_rate = (seed, drop_rate) if self._shuffled else (0, 0.0)
    self.lengths = self._clip_lengths()  # Tokens of every clip of the dataset.
    # The numbers of the split's clips that fit a row, and of those that do not.
    self.clips, self.unpackable = self._select(split, validation_fraction, best)
    lengths = self.lengths[self.clips]
    folder = dataset.directory / "plans"
    self._layout = packing.cached_layout(lengths, row_tokens, max_clips, folder)
    self._lock = threading.Lock()
    self._plan = functools.lru_cache(maxsize=2)(self._plan_epoch)

  @property
  def per_epoch(self) -> int:
    """The number of rows in an epoch."""
    return self._layout.num_rows

  def __getitem__(self, index: int) -> Row:
    """Returns the clips of row `index`. Reads no record."""
    number, row = divmod(index, self.per_epoch)
    epoch = self._epoch_plan(number).rows
    clips = epoch.clips[epoch.starts[row] : epoch.starts[row + 1]]
    return Row(number, self.clips[clips])

  def without(self, index: int, avoided: frozenset[str]) -> Row:
    """Returns row `index` without the clips of these names; the next row that has others if none.

    Raises:
      UserError: there are no other clips.
    """
    for number in range(index, index + self.per_epoch + 1):
      row = self[number]
      if not avoided:
        return row
      kept = [clip for clip in row.clips.tolist() if self.dataset.source(clip) not in avoided]
      if kept:
        return Row(row.epoch, np.array(kept, row.clips.dtype))
    raise UserError(f"all clips of {self.dataset.directory} are avoided: they made steps bad")

  def read(self, index: int) -> Batch:
    """Reads row `index`, as a batch of one row."""
    return self.pack(self[index])

  def pack(self, row: Row) -> Batch:
    """Reads the clips of a row, as a batch of one row."""
    plan = self._epoch_plan(row.epoch)
    return packing.pack(
      [self._example(int(clip), plan) for clip in row.clips],
      patch=self._patch,
      row_tokens=self.row_tokens,
      max_clips=self.max_clips,
    )

  def _clip_lengths(self) -> Int[np.ndarray, " clips"]:
    index, directory = self.dataset.index, self.dataset.directory
    if (index.text_shape != index.text_shape[0]).any():
      raise UserError(f"the clips of {directory} have text states of different sizes")
    text_shape = tuple(index.text_shape[0].tolist())
    if self._drop is not None and self._drop.shape != text_shape:
      raise UserError(
        f"an empty prompt is {self._drop.shape} numbers, but the captions of {directory} are\n"
        f"{text_shape}: encode the clips again with the text encoder of this config"
      )
    latents = index.latent_shape[:, :3]
    if (odd := (latents % np.array(self._patch))[:, 1:].any(axis=1)).any():
      clip = int(np.argmax(odd))
      raise UserError(
        f"{self.dataset.source(clip)!r} in {directory} has (f, h, w) latents\n"
        f"{tuple(latents[clip].tolist())}, whose sides patches of {self._patch} do not divide:\n"
        "encode it at sizes that they do"
      )
    return packing.clip_tokens(latents, patch=self._patch, text_length=text_shape[0])

  def _select(
    self, split: str, validation_fraction: float, best: float
  ) -> tuple[Int[np.ndarray, " clips"], Int[np.ndarray, " too_long"]]:
    """Returns the split's clips that fit a row, and those that do not."""
    held_out = are_held_out(self.dataset.index.source_hash, validation_fraction)
    chosen = self._best(self._usable() & (held_out if split == "validation" else ~held_out), best)
    fits = self.lengths <= self.row_tokens
    clips, too_long = np.flatnonzero(chosen & fits), np.flatnonzero(chosen & ~fits)
    directory = self.dataset.directory
    if not chosen.any():
      raise EmptySplitError(
        f"none of the {len(chosen)} clips of {directory} is in the {split} split:\n"
        f"change config.data.validation_fraction, which is {validation_fraction}"
      )
    if not len(clips):
      raise EmptySplitError(
        f"none of the {split} clips of {directory} fits a row of {self.row_tokens} tokens; the\n"
        f"shortest has {self.lengths[chosen].min()}: raise row_tokens or encode smaller clips"
      )
    if len(too_long):
      logging.warning(
        "%d of %d %s clips are longer than a row of %d tokens and are left out, the first is %r",
        len(too_long),
        chosen.sum(),
        split,
        self.row_tokens,
        self.dataset.source(int(too_long[0])),
      )
    return clips, too_long

  def _usable(self) -> Bool[np.ndarray, " clips"]:
    """Returns which clips can be trained on, of any split: with images, those that move."""
    moves = self.dataset.index.num_frames > 1
    if not self._with_images or moves.all():
      return np.ones_like(moves)
    logging.warning(
      "%d of %d clips of %s are left out: a clip of one frame is its own image",
      len(moves) - moves.sum(),
      len(moves),
      self.dataset.directory,
    )
    return moves

  def _best(
    self, chosen: Bool[np.ndarray, " clips"], fraction: float
  ) -> Bool[np.ndarray, " clips"]:
    """Keeps the fraction of the chosen clips with the highest scores, rounded, at least one clip.

    It chooses inside a split, so that each split keeps its fraction even if few clips are held out.
    Clips of the same score are ordered by the hashes of their names.
    """
    if fraction == 1:
      return chosen
    score, directory = self.dataset.index.score, self.dataset.directory
    if (unscored := np.isnan(score)).any():
      clip = int(np.argmax(unscored))
      raise UserError(
        f"A stage with `best` {fraction} wants the clips of the highest scores, but of those in\n"
        f"{directory} {1 - unscored.mean():.1%} have one; {self.dataset.source(clip)!r} has none.\n"
        'Give each line of the manifest a number, "score": 0.9, and encode the clips again into '
        "another folder;\nor set the stage's `best` to 1.0, for all clips."
      )
    clips = np.flatnonzero(chosen)
    order = np.lexsort((self.dataset.index.source_hash[clips], -score[clips]))
    kept = np.zeros_like(chosen)
    kept[clips[order[: max(round(fraction * len(clips)), 1)]]] = True
    return kept

  def _epoch_plan(self, number: int) -> Plan:
    with self._lock:  # Otherwise all threads that reach a new epoch would plan it.
      return self._plan(number if self._shuffled else 0)

  def _plan_epoch(self, number: int) -> Plan:
    return Plan(
      number,
      packing.plan_epoch(self._layout, self.lengths[self.clips], self._seed, number),
      packing.dropped(self._drop_rate, len(self.dataset), self._seed, number),
      packing.captions(self.dataset.index.captions, self._seed, number),
    )

  def _example(self, clip: int, plan: Plan) -> Example:
    """Reads a clip as an epoch shows it: with one caption or none, and one image or none."""
    example = self.dataset[clip].with_caption(int(plan.captions[clip]))
    text, image = example.text, None
    if plan.dropped[clip]:
      text = np.zeros_like(text) if self._drop is None else self._drop.astype(text.dtype)
    if self._with_images and example.image is not None:
      turn = plan.number % len(example.image)
      image = example.image[turn : turn + 1]
    return example._replace(text=text, image=image)
