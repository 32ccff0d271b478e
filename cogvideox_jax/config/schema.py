"""Every key of a training config: its type, range, meaning and source.

Users write configs as `ml_collections.ConfigDict` (configs/) and override keys on the command line.
`config/read.py` turns a ConfigDict, or the JSON of a workdir, into these dataclasses once, and the
package passes on nothing else. Values are those of the configs. A default here is none of them: it
says what trainings did before the key existed, for stored configs that lack it (config/older.py).

Sources: "paper" is arXiv:2408.06072; "SAT" is the code of the authors; "published" is what the
released model folders hold in diffusers' layout; "ours" was not published.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cogvideox_jax import sharding
from cogvideox_jax.config_keys import (
  AT_LEAST_ZERO,
  FINITE,
  FRACTION,
  SEED,
  Range,
  key,
)
from cogvideox_jax.conversion.folder import SHIPPED, TEXT_DROPS
from cogvideox_jax.data.media import DEFAULT_LIMITS, Limits
from cogvideox_jax.diffusion.noise import NoiseConfig
from cogvideox_jax.diffusion.objective import WEIGHTINGS
from cogvideox_jax.diffusion.solvers import SOLVERS
from cogvideox_jax.models import graphs
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.rematerialization import REMAT
from cogvideox_jax.models.vae_config import IMAGE_SCALES

DEVICES = Range(
  "at least 1, or -1 for all devices that are left", lambda number: number == -1 or number >= 1
)
CONTEXT = Range(
  "at least 1, or -1 for all devices that are left, or 0 for what each stage says",
  lambda number: number >= -1,
)
UPDATES = Range(
  "a whole number of updates, at least 0, or a fraction of them below 1",
  lambda number: 0 <= number < 1 or (number >= 1 and number == int(number)),
)
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


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
  """How long to train, and what changes from stage to stage."""

  steps: int = field(metadata=key("Updates in total, over all stages.", "paper Table 5"))
  carry_optimizer: bool = field(
    default=True,
    metadata=key("Whether the next stage keeps the optimizer's moments instead of zeroing them."),
  )
  growth: str = field(
    default="extrapolate",
    metadata=key(
      "How positions change with the sizes of later stages. extrapolate: a token's position is its "
      "index; interpolate: positions are divided by the ratio of the short sides.",
      "paper section 2.4",
      choices=("extrapolate", "interpolate"),
    ),
  )
  explicit_uniform: bool = field(
    metadata=key(
      "Whether each row of the batch draws its timesteps from its own interval.",
      "paper section 2.5",
    )
  )
  weighting: str = field(
    default="tokens",
    metadata=key(
      "What the loss is a mean of. clips: every clip of a batch counts the same; tokens: every "
      "vision token does, so that a long clip counts for many images.",
      "SAT and diffusers: clips",
      choices=WEIGHTINGS,
    ),
  )


_TABLE_6 = "transformer: paper Table 6; VAE: ours"


@dataclass(frozen=True)
class OptimizerConfig:
  """AdamW, its schedule, and the moving average of the weights."""

  learning_rate: float = field(metadata=key("Peak learning rate, unless a stage has its own."))
  warmup_steps: int | float = field(
    metadata=key(
      "Updates of linear warm-up in each stage; below 1, a fraction of the stage's updates. With "
      "several stages, a tenth of each at most.",
      allowed=UPDATES,
    )
  )
  final_fraction: float = field(
    metadata=key("Fraction of the peak at which the cosine ends.", allowed=FRACTION)
  )
  b1: float = field(metadata=key("Decay of the first moment.", _TABLE_6, allowed=FRACTION))
  b2: float = field(metadata=key("Decay of the second moment.", _TABLE_6, allowed=FRACTION))
  eps: float = field(
    metadata=key("Added to the root of the second moment in the update's denominator.", _TABLE_6)
  )
  weight_decay: float = field(
    metadata=key(
      "Decay of kernels, multiplied with the learning rate. Biases and norms have none.",
      _TABLE_6,
      allowed=AT_LEAST_ZERO,
    )
  )
  clip_norm: float = field(
    metadata=key("Largest global norm of the gradient; larger ones are scaled to it.", _TABLE_6)
  )
  ema_decay: float = field(
    metadata=key("Decay of the moving average of the weights.", allowed=FRACTION)
  )


@dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis, in each slice of the job. One axis may be -1."""

  data: int = field(
    metadata=key("Devices that share the rows and hold whole copies.", allowed=DEVICES)
  )
  fsdp: int = field(metadata=key("Devices that share the rows and the state.", allowed=DEVICES))
  context: int = field(
    metadata=key(
      "Devices that share the tokens of each row; for the VAE, the frames of each clip.",
      allowed=CONTEXT,
    )
  )
  tensor: int = field(
    metadata=key(
      "Devices that share the heads and the MLP's width; for the VAE, the height of each clip.",
      allowed=DEVICES,
    )
  )


@dataclass(frozen=True)
class CheckpointConfig:
  """When to save, and what to keep."""

  every: int = field(metadata=key("Updates from save to save. The end of a stage is always saved."))
  keep: int = field(metadata=key("Newest checkpoints to keep."))


@dataclass(frozen=True)
class ValidationConfig:
  """The loss on held-out clips."""

  every: int = field(
    metadata=key("Updates from measurement to measurement. 0: never.", allowed=AT_LEAST_ZERO)
  )
  batches: int = field(metadata=key("Batches of held-out clips in a measurement, at most."))


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
  """Videos sampled during training; also how `sample` samples a workdir by default."""

  every: int = field(
    metadata=key("Updates from preview to preview. 0: never.", allowed=AT_LEAST_ZERO)
  )
  prompts: tuple[str, ...] = field(
    metadata=key("Prompts to sample, each with a fixed seed.", form="hold texts", may_be_empty=True)
  )
  images: tuple[str, ...] = field(
    default=(),
    metadata=key(
      "Image files, one for each prompt, for models that see an image.",
      form="hold names of files",
      may_be_empty=True,
      is_path=True,
    ),
  )
  num_frames: int = field(metadata=key("Pixel frames of a preview, 4k+1."))
  height: int = field(metadata=key("Height of a preview in pixels."))
  width: int = field(metadata=key("Width of a preview in pixels."))
  steps: int = field(metadata=key("Sampling steps.", "published pipelines"))
  guidance_scale: float = field(
    metadata=key("Scale of classifier-free guidance.", "published pipelines", allowed=AT_LEAST_ZERO)
  )
  solver: str = field(
    metadata=key("Sampling method.", "published 2B scheduler", choices=tuple(SOLVERS))
  )


@dataclass(frozen=True)
class InitConfig:
  """How a training begins with the weights of `init_from`."""

  keep: str = field(
    metadata=key(
      "Whose positions, patch, noise schedule, dropped caption and image scale hold if those of "
      "the weights differ from the config's. source: those of the weights, in all stages; config: "
      "the config's; empty: the difference is refused.",
      choices=("", "source", "config"),
    )
  )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """The transformer's training: the keys of configs/base.py."""

  seed: int = field(
    metadata=key("Seed of drawn weights, order of clips, timesteps and noise.", allowed=SEED)
  )
  components: str = field(
    metadata=key(
      "Model folder, or shipped name, with the VAE, text encoder and tokenizer.",
      is_path=True,
      names=SHIPPED,
    )
  )
  init_from: str = field(
    metadata=key(
      "Model folder or workdir whose transformer the training starts from. Empty: drawn weights.",
      is_path=True,
      names=SHIPPED,
    )
  )
  init: InitConfig = field(default=InitConfig(keep=""), metadata=key("The weights of init_from."))
  dtype: str = field(
    metadata=key(
      "Type that the networks compute in. auto: float32 on CPUs, bfloat16 elsewhere.",
      choices=graphs.DTYPES,
    )
  )
  remat: str = field(
    metadata=key(
      "What each layer's backward pass recomputes. none: nothing; full: everything; attention: "
      "all but attention; branches: all but attention and the MLP's output; linear: all but "
      "attention and the outputs of linear layers; offload: as attention, but what the backward "
      "pass keeps waits in the host's memory.",
      choices=tuple(REMAT),
    )
  )
  model: DiTConfig = field(metadata=key("The transformer."))
  noise: NoiseConfig = field(metadata=key("The noise schedule."))
  text: TextConfig = field(metadata=key("Captions."))
  image: ImageConfig = field(metadata=key("The first frame, for models that see an image."))
  data: DataConfig = field(metadata=key("Which clips to train on."))
  stages: Mapping[str, StageConfig] = field(
    metadata=key(
      "Stages by name, trained one after the other in the order of their names.",
      form="be a stage: write base.stage(...)",
    )
  )
  train: ScheduleConfig = field(metadata=key("How long to train."))
  optimizer: OptimizerConfig = field(metadata=key("AdamW and the moving average."))
  mesh: MeshConfig = field(metadata=key("Devices along each mesh axis, in each slice of the job."))
  sharding: str = field(
    metadata=key("How arrays are split over the mesh.", choices=tuple(sharding.RULES))
  )
  cpu_devices: int = field(metadata=key("Devices that a CPU counts as. They share its cores."))
  log_every: int = field(metadata=key("Updates from metrics line to metrics line."))
  checkpoint: CheckpointConfig = field(metadata=key("When to save."))
  validation: ValidationConfig = field(metadata=key("The loss on held-out clips."))
  preview: PreviewConfig = field(metadata=key("Videos sampled during training."))
