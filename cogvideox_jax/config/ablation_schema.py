"""Every key of a config of the VAE's ablations: its type, range and meaning."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cogvideox_jax.config.vae_schema import VAELossConfig, VAETrainConfig
from cogvideox_jax.config_keys import SEED, key
from cogvideox_jax.models.vae_config import VAEConfig


@dataclass(frozen=True)
class ClipSetConfig:
  """Clips that every variant is trained and scored on, apart from other sets."""

  path: str = field(
    metadata=key(
      "Manifest or folder of videos. Empty: the embedded clips, rendered in WORKDIR/clips.",
      is_path=True,
    )
  )


@dataclass(frozen=True)
class VAEVariantConfig:
  """What differs from variant to variant; all else is that of `training`."""

  model: VAEConfig = field(metadata=key("The variant's VAE, in place of training.model."))
  loss: VAELossConfig = field(metadata=key("The variant's loss, in place of training.loss."))


@dataclass(frozen=True)
class ClaimConfig:
  """A claim: one variant scores less than another."""

  lower: str = field(metadata=key("The variant that scores less."))
  higher: str = field(metadata=key("The variant that scores more."))
  score: str = field(
    metadata=key(
      "The score.", choices=("psnr", "psnr_clip", "ssim", "lpips", "fvd", "flicker_excess")
    )
  )


@dataclass(frozen=True)
class VAEAblationConfig:
  """An ablation of the VAE: the keys of configs/table1.py.

  Each variant is trained on each set of clips with each seed, and scored on the set's files that
  data.validation_fraction holds out.
  """

  training: VAETrainConfig = field(
    metadata=key("The training that variants share. Its seed draws the embedded clips.")
  )
  sets: Mapping[str, ClipSetConfig] = field(
    metadata=key("Sets of clips by name.", form="be a set of clips, with its path")
  )
  variants: Mapping[str, VAEVariantConfig] = field(
    metadata=key("Variants by name.", form="be a variant, with all keys of one")
  )
  seeds: tuple[int, ...] = field(
    metadata=key(
      "Seeds of weights, batches and noise; one run of each.", allowed=SEED, form="hold numbers"
    )
  )
  claims: Mapping[str, ClaimConfig] = field(
    default_factory=dict,
    metadata=key(
      "Claims by name, judged on each set. A claim holds if the gap of the means is positive and "
      "exceeds twice its standard deviation over seeds.",
      form="be a claim, with all keys of one",
    ),
  )

  def run(self, variant: str, seed: int, clips: str) -> VAETrainConfig:
    """Returns the training of a variant with a seed.

    Args:
      clips: the manifest or folder.
    """
    chosen = self.variants[variant]
    data = replace(self.training.data, path=clips)
    return replace(self.training, seed=seed, model=chosen.model, loss=chosen.loss, data=data)
