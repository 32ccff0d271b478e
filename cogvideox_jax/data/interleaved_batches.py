"""Batches of images among batches of videos, in a fixed proportion."""

import math
from collections.abc import Generator

import numpy as np
from jaxtyping import UInt8

from cogvideox_jax.data.clip_batches import BatchSize, ClipBatches, RowsOf
from cogvideox_jax.data.clip_reading import Reading, read_ahead


class InterleavedBatches:
  """An endless sequence of batches as `ClipBatches`, of which a share holds images.

  Batch k is the next one of the images or of the videos, and which of them follows from k alone.
  Over any stretch the images have their share, to within one batch. An epoch is one of the videos.
  """

  def __init__(self, images: ClipBatches, videos: ClipBatches, image_share: float):
    """image_share: the fraction of the batches that hold images, above 0 and below 1."""
    self._images, self._videos, self._share = images, videos, image_share

  @property
  def per_epoch(self) -> int:
    """Batches of an epoch, those of images among them; rounded up."""
    return math.ceil(self._videos.per_epoch / (1 - self._share))

  def epoch(self, k: int) -> int:
    """The epoch of the videos, from 0, at batch k."""
    return self._videos.epoch(k - self._images_before(k))

  def sizes_of(self, k: int) -> BatchSize:
    """The shape of batch k; decodes nothing."""
    batches, own = self._place(k)
    return batches.sizes_of(own)

  def clips(self, k: int) -> list[str]:
    """As `ClipBatches.clips`."""
    batches, own = self._place(k)
    return batches.clips(own)

  def batch(self, k: int, rows: RowsOf | None = None) -> UInt8[np.ndarray, "b F H W 3"]:
    """Decodes batch k. Arguments and errors are those of `ClipBatches.iterate`."""
    return self.start(k, rows).result()

  def iterate(
    self, start: int = 0, rows: RowsOf | None = None
  ) -> Generator[UInt8[np.ndarray, "b F H W 3"], None, None]:
    """As `ClipBatches.iterate`."""
    return read_ahead(lambda k: self.start(k, rows), start)

  def start(self, k: int, rows: RowsOf | None, avoided: frozenset[str] = frozenset()) -> Reading:
    """As `ClipBatches.start`."""
    batches, own = self._place(k)
    return batches.start(own, rows, avoided)

  def _images_before(self, k: int) -> int:
    return math.floor(k * self._share)

  def _place(self, k: int) -> tuple[ClipBatches, int]:
    """Returns the sequence that batch k is taken from, and its number there."""
    before = self._images_before(k)
    if self._images_before(k + 1) > before:
      return self._images, before
    return self._videos, k - before
