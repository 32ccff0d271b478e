"""Table 1 of the paper at a small size: compression and channels of the VAE's latents.

python -m cogvideox_jax.evaluate vae --ablation=configs/table1.py --workdir=runs/table1

With `--ablation=configs/table1.py:FOLDER` the variants are also trained, apart, on the videos of
that folder. The letters of variants are the paper's. Sizes and steps are ours, for minutes of a
CPU; `--ablation.training.train.steps=N` and the like change them.
"""

from ml_collections import ConfigDict

from configs import vae_tiny

CHANNELS = (8, 16, 16, 32)
# Channels of the latents, temporal compression, and channels of the levels.
VARIANTS = {
  "A": (8, 4, CHANNELS),
  "B": (16, 4, CHANNELS),
  "C": (32, 4, CHANNELS),
  "D": (32, 8, CHANNELS),
  "E": (128, 8, (*CHANNELS, 32)),
  "baseline": (4, 1, CHANNELS),
}
# The order inside 8x8x4, and what compressing time twice as much costs.
CLAIMS = {"channels_16_32": "BC", "channels_8_16": "AB", "time_8_4": "DC"}


def get_config(folder: str = "") -> ConfigDict:
  config = ConfigDict()
  config.training = training()
  config.sets = ConfigDict({"shapes": {"path": ""}})
  if folder:
    config.sets.videos = ConfigDict({"path": folder})
  config.variants = ConfigDict({name: variant(*sizes) for name, sizes in VARIANTS.items()})
  config.seeds = (0, 1, 2)
  config.claims = ConfigDict(
    {
      name: {"lower": lower, "higher": higher, "score": "psnr"}
      for name, (lower, higher) in CLAIMS.items()
    }
  )
  return config.lock()


def training() -> ConfigDict:
  """Returns the training that all variants share."""
  config = vae_tiny.get_config()
  with config.unlocked():
    config.data.clips = 240
    config.data.sizes = ((64, 64),)
    config.data.durations = (17,)
    config.data.validation_fraction = 0.25
    config.train.steps = 600
    config.train.frames = 17
    config.validation.every = 600
    config.checkpoint.every = 300
    config.preview.every = 600
  return config


def variant(latent_channels: int, temporal_compression: int, channels: tuple) -> ConfigDict:
  """Returns a variant with one ResNet block in each level."""
  config = ConfigDict({"model": vae_tiny.model(), "loss": vae_tiny.loss()})
  config.model.channels = channels
  config.model.latent_channels = latent_channels
  config.model.temporal_compression = temporal_compression
  return config
