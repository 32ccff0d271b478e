"""The records that one stage hands to the next, and the letters of their axes.

| letter | axis                              | letter  | axis                         |
|--------|-----------------------------------|---------|------------------------------|
| `b`    | packed rows of a batch, or videos | `F H W` | pixel frames, height, width  |
| `n`    | tokens of a row, text and vision  | `f h w` | latent frames, height, width |
| `s`    | segments of a row; 0 is padding   | `c`     | channels                     |
| `k`    | clips a row can hold, `s - 1`     | `l`     | text tokens of a clip        |
| `p`    | numbers in a vision patch         | `t`     | width of the text states     |
| `d`    | width of the transformer          | `e`     | width of the time embedding  |
| `q`    | numbers of one frame of a patch   |         |                              |

`F = 4 f - 3`: the first frame is compressed alone, the others four at a time.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

# The parameters of a network: a tree of dicts, as from `nnx.to_pure_dict`, whose leaves are arrays,
# `conversion.tensors.Lazy` ones, or shapes.
Params = dict[str, Any]

VISION, TEXT = 0, 1  # The two experts, in the order their weights are stored.


class Caption(NamedTuple):
  """A text that describes a clip, before and after the text encoder."""

  caption: str
  text: Float[np.ndarray, "l t"]  # T5's states, with those of padding, which the model uses too.


class Example(NamedTuple):
  """A clip after the frozen networks. Training rows are packed from these."""

  mean: Float[np.ndarray, "f h w c"]  # Mean and log-variance of the VAE's posterior; not scaled.
  logvar: Float[np.ndarray, "f h w c"]
  text: Float[np.ndarray, "l t"]  # See `Caption.text`; the states of the caption in use.
  caption: str
  source: str  # The clip's name: unique in its dataset, and the same in every run.
  num_frames: int  # In pixels, like height and width.
  height: int
  width: int
  fps: float
  score: float | None = None  # The user's own measure of the clip; None if there is none.
  others: tuple[Caption, ...] = ()  # The clip's captions that are not in use.
  # For image-to-video models: mean and log-variance of noised copies of the first frame.
  image: Float[np.ndarray, "draws 2 h w c"] | None = None
  # The transfer of the clip's file: sdr, hlg or pq. The clip was encoded as sRGB whatever it is.
  transfer: str = "sdr"

  def with_caption(self, number: int) -> "Example":
    """Returns the example with only one caption: 0 is the one in use, 1 the first other."""
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
  """Packed rows: the text tokens of a clip, its vision tokens, the next clip, ..., padding.

  The loader gives host arrays, the training step takes device arrays; the annotations say only the
  shapes.
  """

  mean: Float[np.ndarray, "b n p"]  # Patches of the posterior's mean; 0 at text and padding.
  logvar: Float[np.ndarray, "b n p"]
  text: Float[np.ndarray, "b k l t"]  # Text states of each clip; 0 where a row holds fewer.
  segment_ids: Int[np.ndarray, "b n"]  # This field and the next three: see TokenLayout.
  experts: Int[np.ndarray, "b n"]
  coordinates: Int[np.ndarray, "b n 3"]
  grids: Int[np.ndarray, "b s 3"]
  # If a patch spans several latent frames: how many repeat each segment's first one in front.
  extra: Int[np.ndarray, "b s"] | None = None
  # If the model sees an image: its mean and log-variance, at tokens of the first patch in time.
  image: Float[np.ndarray, "b n 2 q"] | None = None

  @property
  def layout(self) -> TokenLayout:
    return TokenLayout(self.segment_ids, self.experts, self.coordinates, self.grids)
