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
from cogvideox_jax.config.data_schema import (
  DataConfig,
  ImageConfig,
  SourceConfig,
  StageConfig,
  TextConfig,
)
from cogvideox_jax.config.run_schema import (
  CheckpointConfig,
  MeshConfig,
  PreviewConfig,
  ValidationConfig,
)
from cogvideox_jax.config.safety_schema import NO_GUARD, NO_WATCHDOG, GuardConfig, WatchdogConfig
from cogvideox_jax.config.schedule_schema import OptimizerConfig, ScheduleConfig
from cogvideox_jax.config_keys import SEED, key
from cogvideox_jax.conversion.folder import SHIPPED
from cogvideox_jax.diffusion.noise import NoiseConfig
from cogvideox_jax.models import graphs
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.rematerialization import REMAT

__all__ = [
  "CheckpointConfig",
  "DataConfig",
  "ImageConfig",
  "InitConfig",
  "MeshConfig",
  "OptimizerConfig",
  "PreviewConfig",
  "ScheduleConfig",
  "SourceConfig",
  "StageConfig",
  "TextConfig",
  "TrainConfig",
  "ValidationConfig",
]


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
  guard: GuardConfig = field(default=NO_GUARD, metadata=key("What becomes of bad steps."))
  watchdog: WatchdogConfig = field(default=NO_WATCHDOG, metadata=key("When a training hangs."))
  validation: ValidationConfig = field(metadata=key("The loss on held-out clips."))
  preview: PreviewConfig = field(metadata=key("Videos sampled during training."))
