"""Reads what a training needs from the components of its config: the VAE's scale and sizes."""

from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.conversion import component_fields, diffusers
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.diffusion.latents import LatentConfig
from cogvideox_jax.models.vae_config import VAEConfig


def latent_config(config: TrainConfig) -> LatentConfig:
  """Returns how latents of the config's VAE are scaled and cut into patches for the transformer."""
  vae = vae_config(config)
  return LatentConfig(
    patch=config.model.patch,
    scaling_factor=vae.scaling_factor,
    image_scale=vae.image_scale(config.image.scale),
    image_drop_rate=config.image.drop_rate,
  )


def vae_config(config: TrainConfig | VAETrainConfig) -> VAEConfig:
  """Returns the VAE's config from `config.components`; if that is empty, the published VAE's.

  Programs can be compiled without components (aot/). A training of the VAE has its own in
  `config.model`.
  """
  if isinstance(config, VAETrainConfig):
    return config.model
  if not config.components:
    return VAEConfig()
  fields, where = diffusers.read_fields(open_model(config.components).path / "vae", "config.json")
  return component_fields.read_vae(fields, where)
