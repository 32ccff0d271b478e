"""Reads what a training must know of its config's components: the VAE's scale and sizes."""

from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.conversion import component_fields, diffusers
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.diffusion.latents import LatentConfig
from cogvideox_jax.models.vae_config import VAEConfig


def latent_config(config: TrainConfig) -> LatentConfig:
  """How the transformer sees latents of the VAE of `vae_config`."""
  vae = vae_config(config)
  return LatentConfig(
    patch=config.model.patch,
    scaling_factor=vae.scaling_factor,
    image_scale=vae.image_scale(config.image.scale),
    image_drop_rate=config.image.drop_rate,
  )


def vae_config(config: TrainConfig) -> VAEConfig:
  """Of `config.components`; if that is empty the published one, which programs can be made for."""
  if not config.components:
    return VAEConfig()
  fields, where = diffusers.read_fields(open_model(config.components).path / "vae", "config.json")
  return component_fields.read_vae(fields, where)
