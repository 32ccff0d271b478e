"""The published VAE: 8x8 in space, 4x in time, 16 channels of latents, 215,583,907 parameters.

python -m cogvideox_jax.train_vae --config=configs/vae.py --config.data.path=CLIPS --workdir=DIR

Its two stages are the paper's (section 2.1): clips of 17 frames of 256x256 pixels at 8 or 16 frames
a second, then of 161 frames, which devices share. The losses are the paper's, too: L1, LPIPS, KL
and a 3D discriminator. How long the published VAE was trained and how its losses were weighed was
not released, so all these values are ours.
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
  config.data.more_fps = (16.0,)
  config.data.image_share = 0.2

  config.train.steps = 100_000
  config.train.frames = 17 * 16
  config.train.batch_multiple = 16
  config.train.remat = True
  with config.unlocked():
    config.stages.short = stage(share=9)
    config.stages.with_context = stage(
      share=1, durations=(161,), frames=161 * 2, batch_multiple=2, context=8, learning_rate=1e-5
    )

  config.loss.update(l1=1.0, l2=0.0, kl=1e-6, perceptual=1.0, perceptual_frames=8)
  config.loss.update(adversarial=0.1, adaptive=False, gan_start=5000)
  config.discriminator.model.channels = (64, 128, 256, 512)
  config.discriminator.model.groups = 32
  config.discriminator.update(learning_rate=1e-4, frames=17)

  config.optimizer.learning_rate = 1e-4
  config.optimizer.warmup_steps = 1000
  config.optimizer.ema_decay = 0.999
  return config


def stage(
  *,
  share: float,
  sizes: tuple[tuple[int, int], ...] = (),
  durations: tuple[int, ...] = (),
  frames: int = 0,
  batch_multiple: int = 0,
  context: int = 1,
  learning_rate: float = 0,
) -> ConfigDict:
  """Returns a stage. What is empty or 0 is as in `config.data`, `train` and `optimizer`."""
  return ConfigDict(
    {
      "sizes": sizes,
      "durations": durations,
      "frames": frames,
      "batch_multiple": batch_multiple,
      "context": context,
      "share": share,
      "learning_rate": learning_rate,
    }
  )
