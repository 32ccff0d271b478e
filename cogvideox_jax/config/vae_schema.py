"""Every key of a config of the VAE's training: its type, range, meaning and source.

See `config/schema.py` for those of the transformer's training, some of which both share.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cogvideox_jax import sharding
from cogvideox_jax.config.data_schema import DURATIONS, SIZES
from cogvideox_jax.config.run_schema import CheckpointConfig, MeshConfig, ValidationConfig
from cogvideox_jax.config.safety_schema import NO_GUARD, NO_WATCHDOG, GuardConfig, WatchdogConfig
from cogvideox_jax.config.schedule_schema import UPDATES, OptimizerConfig
from cogvideox_jax.config_keys import AT_LEAST_ZERO, FRACTION, SEED, Range, key
from cogvideox_jax.conversion.folder import SHIPPED
from cogvideox_jax.data.media import DEFAULT_LIMITS, Limits
from cogvideox_jax.models.discriminator import DiscriminatorConfig
from cogvideox_jax.models.vae_config import VAEConfig

SHARE = Range("at least 0 and below 1", lambda number: 0 <= number < 1)


@dataclass(frozen=True, kw_only=True)
class VAEDataConfig:
  """Which clips to train the VAE on."""

  path: str = field(
    metadata=key(
      "Manifest or folder of videos. Empty: render the embedded clips in WORKDIR/data.",
      is_path=True,
    )
  )
  clips: int = field(
    metadata=key("Embedded clips to render if there is no path.", allowed=AT_LEAST_ZERO)
  )
  fps: float = field(metadata=key("Frames a second that clips are brought to."))
  more_fps: tuple[float, ...] = field(
    default=(),
    metadata=key(
      "Faster frame rates. Each time that a clip is read, one of fps and these is drawn, of those "
      "that its file has. The clip then begins at the same instant and is shorter.",
      "paper section 2.1: 8 and 16",
      form="hold frame rates, such as (16.0,)",
      may_be_empty=True,
    ),
  )
  image_share: float = field(
    default=0.0,
    metadata=key(
      "Fraction of the batches that hold single frames: the images of the data, or if it has none "
      "the first frames of its clips. 0: images come as often as the data has them.",
      "Open-Sora: 0.2",
      allowed=SHARE,
    ),
  )
  sizes: tuple[tuple[int, int], ...] = field(
    metadata=key("(height, width) of the buckets in pixels.", "paper section 2.1", form=SIZES)
  )
  durations: tuple[int, ...] = field(
    metadata=key(
      "Lengths of the buckets in pixel frames, each 4k+1.", "paper section 2.1", form=DURATIONS
    )
  )
  validation_fraction: float = field(
    default=0.0,
    metadata=key("Fraction of files held out, chosen by a hash of their names.", allowed=FRACTION),
  )
  limits: Limits = field(
    default=DEFAULT_LIMITS, metadata=key("What is refused: files above a limit.")
  )
  subfolders: bool = field(
    default=True,
    metadata=key("Whether the folders inside a folder of videos are searched, as by `encode`."),
  )
  allow_links: bool = field(
    default=False,
    metadata=key("Whether links may lead out of the folder, as with `encode --allow_links`."),
  )


@dataclass(frozen=True)
class VAEStageConfig:
  """What one stage of the VAE's training changes. What is empty or 0 is as the config has it."""

  sizes: tuple[tuple[int, int], ...] = field(
    metadata=key("As data.sizes; empty: those.", form=SIZES, may_be_empty=True)
  )
  durations: tuple[int, ...] = field(
    metadata=key(
      "As data.durations; empty: those.", "paper section 2.1", form=DURATIONS, may_be_empty=True
    )
  )
  frames: int = field(metadata=key("As train.frames; 0: that number.", allowed=AT_LEAST_ZERO))
  batch_multiple: int = field(
    metadata=key("As train.batch_multiple; 0: that number.", allowed=AT_LEAST_ZERO)
  )
  context: int = field(
    metadata=key(
      "Most devices that share the frames of a clip, where mesh.context is 0. The mesh takes the "
      "largest number up to it that divides what its other axes leave."
    )
  )
  share: int | float = field(
    metadata=key("This stage's share of train.steps, relative to the other shares.")
  )
  learning_rate: int | float = field(
    metadata=key(
      "Peak learning rate; each stage has its own warm-up and cosine. 0: optimizer.learning_rate.",
      allowed=AT_LEAST_ZERO,
    )
  )


@dataclass(frozen=True, kw_only=True)
class VAEScheduleConfig:
  """How long to train the VAE."""

  steps: int = field(metadata=key("Updates in total, over all stages."))
  frames: int = field(metadata=key("Pixel frames in a batch, which holds clips of one bucket."))
  batch_multiple: int = field(
    default=1,
    metadata=key(
      "The clips of a batch divide by it: the devices that share a batch, times the microbatches."
    ),
  )
  microbatches: int = field(
    default=1,
    metadata=key(
      "Parts in which a device computes its clips of a batch, one after the other; gradients are "
      "summed over them."
    ),
  )
  remat: bool = field(
    default=False,
    metadata=key(
      "Whether the backward pass computes again what is inside each ResNet block, which saves most "
      "of its memory."
    ),
  )


@dataclass(frozen=True)
class VAELossConfig:
  """Weights of the terms of the VAE's loss; the paper names the terms, not their weights."""

  l1: float = field(
    metadata=key("Weight of the mean absolute error over pixels in [-1, 1].", allowed=AT_LEAST_ZERO)
  )
  l2: float = field(
    metadata=key(
      "Weight of the mean squared error over pixels in [-1, 1]. Alone it learns edges sooner than "
      "the absolute error (measured).",
      allowed=AT_LEAST_ZERO,
    )
  )
  kl: float = field(
    metadata=key(
      "Weight of the mean divergence of the latents from the unit normal.", allowed=AT_LEAST_ZERO
    )
  )
  perceptual: float = field(
    default=0.0,
    metadata=key(
      "Weight of the mean LPIPS (VGG16). It needs the extra `metrics`.",
      "Open-Sora: 0.1 to 1; WF-VAE: 1",
      allowed=AT_LEAST_ZERO,
    ),
  )
  perceptual_frames: int = field(
    default=0,
    metadata=key(
      "Frames drawn of each clip that LPIPS looks at. 0: all of them.",
      "SAT: 1",
      allowed=AT_LEAST_ZERO,
    ),
  )
  adversarial: float = field(
    default=0.0,
    metadata=key(
      "Weight of the generator's hinge loss. 0: there is no discriminator.",
      "Open-Sora: 0.05 to 0.5",
      allowed=AT_LEAST_ZERO,
    ),
  )
  adaptive: bool = field(
    default=False,
    metadata=key(
      "Whether the weight is also multiplied with the ratio of gradient norms, of the other terms "
      "to the adversarial one, at the decoder's last layer.",
      "VQGAN",
    ),
  )
  gan_start: int | float = field(
    default=0,
    metadata=key(
      "Updates before the discriminator is trained and counts; below 1, a fraction of train.steps.",
      "paper section 2.1: a few thousand",
      allowed=UPDATES,
    ),
  )


@dataclass(frozen=True)
class DiscriminatorTrainConfig:
  """The discriminator and how it is trained. Its optimizer is otherwise that of the VAE."""

  model: DiscriminatorConfig = field(metadata=key("The discriminator's sizes."))
  learning_rate: float = field(
    metadata=key("Peak learning rate of the discriminator; it decays as the VAE's.")
  )
  b1: float = field(metadata=key("Decay of its first moment.", allowed=FRACTION))
  b2: float = field(metadata=key("Decay of its second moment.", allowed=FRACTION))
  r1: float = field(
    metadata=key(
      "Weight of the penalty on the squared gradient of a real clip's mean logit. 0: none.",
      "arXiv:1801.04406",
      allowed=AT_LEAST_ZERO,
    )
  )
  frames: int = field(
    metadata=key(
      "Successive frames, from a drawn one on, that it sees of a clip. 0: all of them.",
      allowed=AT_LEAST_ZERO,
    )
  )


@dataclass(frozen=True)
class VAEPreviewConfig:
  """Reconstructions made during training."""

  every: int = field(
    metadata=key("Updates from preview to preview. 0: never.", allowed=AT_LEAST_ZERO)
  )


# What older workdirs meant, whose configs lack the group: no discriminator is trained without
# loss.adversarial.
_DISCRIMINATOR = DiscriminatorTrainConfig(
  DiscriminatorConfig(channels=(16, 32, 32), temporal_levels=2, groups=8),
  learning_rate=1e-3,
  b1=0.5,
  b2=0.9,
  r1=0.0,
  frames=0,
)


@dataclass(frozen=True, kw_only=True)
class VAETrainConfig:
  """The VAE's training: the keys of configs/vae_tiny.py."""

  seed: int = field(metadata=key("Seed of drawn weights, batches and noise.", allowed=SEED))
  init_from: str = field(
    default="",
    metadata=key(
      "VAE that the training starts from: a model, a folder of a VAE, or a workdir of train_vae. "
      "Empty: drawn weights.",
      is_path=True,
      names=SHIPPED,
    ),
  )
  model: VAEConfig = field(metadata=key("The VAE."))
  data: VAEDataConfig = field(metadata=key("Which clips to train on."))
  train: VAEScheduleConfig = field(metadata=key("How long to train."))
  stages: Mapping[str, VAEStageConfig] = field(
    default_factory=dict,
    metadata=key(
      "Stages by name, trained one after the other in the order of their names. None: one stage.",
      form="be a stage, with all keys of one",
    ),
  )
  loss: VAELossConfig = field(metadata=key("Weights of the loss."))
  discriminator: DiscriminatorTrainConfig = field(
    default=_DISCRIMINATOR, metadata=key("The discriminator.")
  )
  optimizer: OptimizerConfig = field(metadata=key("AdamW and the moving average."))
  mesh: MeshConfig = field(
    default=MeshConfig(data=1, fsdp=-1, context=1, tensor=1),
    metadata=key("Devices along each mesh axis."),
  )
  sharding: str = field(
    default="fsdp",
    metadata=key("How arrays are split over the mesh.", choices=tuple(sharding.RULES)),
  )
  cpu_devices: int = field(
    default=1, metadata=key("Devices that a CPU counts as. They share its cores.")
  )
  log_every: int = field(metadata=key("Updates from metrics line to metrics line."))
  checkpoint: CheckpointConfig = field(metadata=key("When to save."))
  guard: GuardConfig = field(default=NO_GUARD, metadata=key("What becomes of bad steps."))
  watchdog: WatchdogConfig = field(default=NO_WATCHDOG, metadata=key("When a training hangs."))
  validation: ValidationConfig = field(
    default=ValidationConfig(every=0, batches=1), metadata=key("The loss on held-out clips.")
  )
  preview: VAEPreviewConfig = field(metadata=key("Reconstructions made during training."))
