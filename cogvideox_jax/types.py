"""The records that cross from stage to stage, and the letters of their axes.

| letter | axis                              | letter  | axis                         |
|--------|-----------------------------------|---------|------------------------------|
| `b`    | packed rows of a batch, or videos | `F H W` | pixel frames, height, width  |
| `n`    | tokens of a row, text and vision  | `f h w` | latent frames, height, width |
| `s`    | segments of a row; 0 is padding   | `c`     | channels                     |
| `k`    | clips a row can hold, `s - 1`     | `l`     | text tokens of a clip        |
| `p`    | numbers in a vision patch         | `t`     | width of the text states     |
| `d`    | width of the transformer          | `e`     | width of the time embedding  |
| `q`    | those of one of its frames        |         |                              |

`F = 4 f - 3`: the first frame is compressed alone, the others four at a time.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

VISION, TEXT = 0, 1  # The two experts, in the order their weights are stored.


class Caption(NamedTuple):
  """A text that describes a clip, before and after the text encoder."""

  caption: str
  text: Float[np.ndarray, "l t"]  # T5's states, padding included: content to this model.


class Example(NamedTuple):
  """A clip after the frozen networks: what a training row is packed from."""

  mean: Float[np.ndarray, "f h w c"]  # Of the VAE's posterior; not scaled.
  logvar: Float[np.ndarray, "f h w c"]
  text: Float[np.ndarray, "l t"]  # Of the caption in use, as `Caption.text`.
  caption: str
  source: str  # Names the clip within its dataset: unique, stable over runs.
  num_frames: int  # In pixels, as are height and width.
  height: int
  width: int
  fps: float
  score: float | None = None  # The user's own measure of the clip; None: not measured.
  others: tuple[Caption, ...] = ()  # Its captions that are not in use.
  # To train image to video: mean and log-variance of noised copies of the first frame.
  image: Float[np.ndarray, "draws 2 h w c"] | None = None

  def with_caption(self, number: int) -> "Example":
    """The example with one of its captions in use, alone: 0 is its own, 1 the first other."""
    if not number:
      return self._replace(others=())
    return self._replace(**self.others[number - 1]._asdict(), others=())


class TokenLayout(NamedTuple):
  """Which clip, expert and position each token of packed rows belongs to.

  Training and sampling both give it to the transformer, beside the vision patches, the text states
  and the timesteps. Its arrays are on the host or on devices.
  """

  segment_ids: Int[Any, "b n"]  # 0 is padding, clips from 1.
  experts: Int[Any, "b n"]  # VISION or TEXT; VISION at padding.
  coordinates: Int[Any, "b n 3"]  # Vision: patch (t, h, w). Text: (index, 0, 0).
  grids: Int[Any, "b s 3"]  # Patches of each segment along (t, h, w); ones for padding.


class Batch(NamedTuple):
  """Packed rows. A clip's text tokens, then its vision tokens; clips in turn; padding last.

  A host array from the loader, a device array in the training step: the annotations name the
  shapes only.
  """

  mean: Float[np.ndarray, "b n p"]  # Patches of the posterior's mean; 0 at text and padding.
  logvar: Float[np.ndarray, "b n p"]
  text: Float[np.ndarray, "b k l t"]  # Text states of each clip; 0 where a row holds fewer.
  segment_ids: Int[np.ndarray, "b n"]  # This field and the next three: see TokenLayout.
  experts: Int[np.ndarray, "b n"]
  coordinates: Int[np.ndarray, "b n 3"]
  grids: Int[np.ndarray, "b s 3"]
  # Where a patch spans several latent frames: how many in front repeat a segment's first one.
  extra: Int[np.ndarray, "b s"] | None = None
  # Where the model sees an image: its mean and log-variance, at tokens of the first patch in time.
  image: Float[np.ndarray, "b n 2 q"] | None = None

  @property
  def layout(self) -> TokenLayout:
    return TokenLayout(self.segment_ids, self.experts, self.coordinates, self.grids)
