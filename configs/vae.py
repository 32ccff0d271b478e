"""The published VAE: 8x8 in space, 4x in time, 16 channels of latents, 215,583,907 parameters.

python -m cogvideox_jax.train_vae --config=configs/vae.py --config.data.path=CLIPS --workdir=DIR

It trains as the first stage of the paper (section 2.1): clips of 17 frames of 256x256 pixels. How
the published VAE was trained beyond this was not released, so all other values are ours.
"""

from ml_collections import ConfigDict

from configs import vae_tiny


def get_config() -> ConfigDict:
  config = vae_tiny.get_config()
  config.model.channels = (128, 256, 256, 512)
  config.model.resnets = 3
  config.model.groups = 32

  config.data.sizes = ((256, 256),)
  config.data.durations = (1, 17)

  config.train.steps = 100_000
  config.train.frames = 17 * 16

  config.optimizer.learning_rate = 1e-4
  config.optimizer.warmup_steps = 1000
  config.optimizer.ema_decay = 0.999
  return config
