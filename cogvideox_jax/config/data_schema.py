"""Keys of a training config that say what is trained on: clips, captions, first frames, stages.

See `config/schema.py` for the whole config and for what the sources' names mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cogvideox_jax.config_keys import AT_LEAST_ZERO, FINITE, FRACTION, Range, key
from cogvideox_jax.conversion.folder import TEXT_DROPS
from cogvideox_jax.data.media import DEFAULT_LIMITS, Limits
from cogvideox_jax.models.vae_config import IMAGE_SCALES

PART = Range("a fraction, above 0 and at most 1", lambda number: 0 < number <= 1)
DURATIONS = "hold numbers of frames, such as (1, 9, 17)"
SIZES = "hold (height, width) pairs of pixels, such as ((64, 64), (48, 80))"
SOURCE = "have a path and a weight: write base.source(path, weight)"


@dataclass(frozen=True)
class TextConfig:
  """How captions are used in training."""

  drop: str = field(
    metadata=key(
      "What a dropped caption is replaced by: zeros instead of text states, or the states of the "
      "empty prompt.",
      "zeros: SAT; empty: diffusers",
      choices=TEXT_DROPS,
    )
  )
  drop_rate: float = field(
    metadata=key(
      "Probability of dropping a clip's caption, for classifier-free guidance.",
      "SAT",
      allowed=FRACTION,
    )
  )


@dataclass(frozen=True)
class ImageConfig:
  """The first frame, for models that see an image (model.in_channels is twice out_channels)."""

  draws: int = field(
    metadata=key(
      "Noised copies of each clip's first frame that `encode` stores. Each epoch reads the next."
    )
  )
  log_sigma_mean: float = field(
    metadata=key(
      "Mean of the logarithm of the noise's standard deviation, on pixels in [-1, 1].",
      "SAT",
      allowed=FINITE,
    )
  )
  log_sigma_std: float = field(
    metadata=key(
      "Standard deviation of the logarithm of the noise's standard deviation.",
      "SAT",
      allowed=AT_LEAST_ZERO,
    )
  )
  drop_rate: float = field(
    metadata=key(
      "Probability of replacing a clip's image by zeros. SAT draws once for a batch, this package "
      "once for each clip.",
      "SAT noised_image_dropout",
      allowed=FRACTION,
    )
  )
  scale: str = field(
    metadata=key(
      "What the image's latents are multiplied with. scaled: the VAE's scaling factor; raw: 1; "
      "diffusers: as diffusers reads the VAE's config.",
      "SAT's training",
      choices=IMAGE_SCALES,
    )
  )


@dataclass(frozen=True)
class SourceConfig:
  """One dataset of a mixture."""

  path: str = field(
    metadata=key(
      "An encoded dataset as in data.path, or the folder of one stage under any name.", is_path=True
    )
  )
  weight: float = field(
    metadata=key(
      "This dataset's share of the rows, and so of the tokens, relative to the other weights. 0 "
      "pauses it. Weights may change, and datasets may come and go, when a run is started again: "
      "each continues where it stopped. A row holds clips of one dataset only.",
      allowed=AT_LEAST_ZERO,
    )
  )


@dataclass(frozen=True)
class DataConfig:
  """Which clips to train on."""

  path: str = field(
    metadata=key(
      "Folder of an encoded dataset. Empty: render and encode the embedded clips in WORKDIR/data.",
      is_path=True,
    )
  )
  mixture: Mapping[str, SourceConfig] = field(
    metadata=key("Several datasets by name, instead of data.path.", form=SOURCE)
  )
  clips: int = field(
    metadata=key("Embedded clips to render if no dataset is given.", allowed=AT_LEAST_ZERO)
  )
  fps: float = field(
    metadata=key("Frames a second that clips are brought to.", "paper Table 5: 8; the 1.5: 16")
  )
  validation_fraction: float = field(
    metadata=key(
      "Fraction of clips held out, chosen by a hash of their names. Of few clips it may be none; "
      "then there is no validation.",
      allowed=FRACTION,
    )
  )
  limits: Limits = field(
    default=DEFAULT_LIMITS, metadata=key("What `encode` refuses: files above a limit.")
  )


@dataclass(frozen=True, kw_only=True)
class StageConfig:
  """What one stage of the training trains on, and how."""

  sizes: tuple[tuple[int, int], ...] = field(
    metadata=key(
      "(height, width) of the buckets that clips are resized and cropped to, in pixels. A multiple "
      "of the VAE's spatial compression times the patch.",
      "largest: paper Table 5; others: ours",
      form=SIZES,
    )
  )
  durations: tuple[int, ...] = field(
    metadata=key(
      "Lengths of the buckets in pixel frames, each 4k+1.",
      "largest: paper Table 5; others: ours",
      form=DURATIONS,
    )
  )
  rows: int = field(metadata=key("Packed rows in the global batch."))
  row_tokens: int = field(
    metadata=key("Tokens of a row, text and vision, padding included.", "paper Table 5")
  )
  max_clips: int = field(metadata=key("Most clips in a row."))
  rows_at_once: int = field(
    default=0,
    metadata=key(
      "Rows that a device computes at once (a microbatch). Gradients are summed over its "
      "microbatches. 0: all rows at once.",
      allowed=AT_LEAST_ZERO,
    ),
  )
  context: int = field(
    default=1,
    metadata=key(
      "Most devices that share the tokens of a row, where mesh.context is 0. The mesh takes the "
      "largest number up to it that divides what its other axes leave."
    ),
  )
  share: int | float = field(
    default=1.0,
    metadata=key(
      "This stage's share of train.steps, relative to the other shares. Each stage has at least "
      "one step.",
      "paper Table 5",
    ),
  )
  learning_rate: int | float = field(
    default=0.0,
    metadata=key(
      "Peak learning rate; each stage has its own warm-up and cosine. 0: optimizer.learning_rate.",
      allowed=AT_LEAST_ZERO,
    ),
  )
  data: str = field(
    default="",
    metadata=key("Name of the stage whose encoded clips this stage reads. Empty: its own."),
  )
  best: int | float = field(
    default=1.0,
    metadata=key(
      "Fraction of each dataset's clips to train on: those with the highest manifest score.",
      "paper section 3.1: the best 20% in the last stage",
      allowed=PART,
    ),
  )
