"""What LPIPS and the discriminator do for the tiny VAE: the same steps with and without them.

python -m cogvideox_jax.evaluate vae --ablation=configs/vae_recipe.py --workdir=runs/vae_recipe

All weights are ours; docs/vae.md says what the runs found.
"""

from ml_collections import ConfigDict

from configs import vae_tiny


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.training = training()
  config.sets = ConfigDict({"shapes": {"path": ""}})
  config.variants = ConfigDict(
    {
      "lpips": variant(perceptual=0.1, perceptual_frames=2),
      "lpips_gan": variant(perceptual=0.1, perceptual_frames=2, adversarial=0.02, gan_start=0.5),
      "plain": variant(),
    }
  )
  config.seeds = (0, 1, 2)
  config.claims = ConfigDict(
    {
      "gan_pays": {"lower": "lpips_gan", "higher": "lpips", "score": "lpips"},
      "lpips_falls": {"lower": "lpips_gan", "higher": "plain", "score": "lpips"},
      "psnr_falls": {"lower": "lpips_gan", "higher": "plain", "score": "psnr"},
    }
  )
  return config.lock()


def training() -> ConfigDict:
  """Returns the training of configs/vae_tiny.py, with enough files to score on."""
  config = vae_tiny.get_config()
  with config.unlocked():
    config.data.validation_fraction = 0.05
    config.validation.every = 1500
    config.preview.every = 1500
  return config


def variant(**loss: float) -> ConfigDict:
  """Returns the tiny VAE, with these terms added to its loss."""
  config = ConfigDict({"model": vae_tiny.model(), "loss": vae_tiny.loss()})
  config.loss.update(**loss)
  return config
