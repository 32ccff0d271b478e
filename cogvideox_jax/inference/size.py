"""The size of a video in pixels, and the shape of its latents."""

from collections.abc import Sequence
from typing import NamedTuple

from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.vae_config import VAEConfig


class Size(NamedTuple):
  """The frames of a video, and their height and width in pixels."""

  num_frames: int
  height: int
  width: int

  @property
  def text(self) -> str:
    return f"{self.num_frames} frames of {self.width}x{self.height}"


def default_size(model: DiTConfig, vae: VAEConfig) -> Size:
  """The size that the transformer was made for (`sample_*` of its config)."""
  scale = vae.spatial_compression
  return Size(model.sample_frames, model.sample_height * scale, model.sample_width * scale)


def check_size(size: Size, vae: VAEConfig, patch: Sequence[int] = (1, 1, 1)) -> None:
  """Raises UserError for a size that the VAE, or the transformer's patches, cannot represent.

  patch: latent frames, height and width of the transformer's patch.
  """
  step = vae.temporal_compression
  frames = size.num_frames
  if frames < 1 or (frames - 1) % step:
    lower = max(frames - 1, 0) // step * step + 1
    raise UserError(
      f"num_frames={frames}: the VAE keeps the first frame and compresses the others {step} at a "
      f"time,\nso it must be {step}k + 1. The nearest are {lower} and {lower + step}."
    )
  for name, side in (("height", patch[1]), ("width", patch[2])):
    value, multiple = getattr(size, name), vae.spatial_compression * side
    if value < multiple or value % multiple:
      lower = max(value // multiple, 1) * multiple
      times = f" times the patch's {side}" if side > 1 else ""
      raise UserError(
        f"{name}={value}: must be a multiple of {multiple} pixels (the VAE's "
        f"{vae.spatial_compression}{times}).\n"
        f"The nearest are {lower} and {lower + multiple}."
      )


def latent_shape(size: Size, model: DiTConfig, vae: VAEConfig) -> tuple[tuple[int, ...], int]:
  """Returns the shape (f, h, w, c) of a video's latents, and how many of the f frames are extra.

  A temporal patch (CogVideoX 1.5) needs a whole number of latent frames. The extra ones are the
  first, and are dropped before decoding, as in diffusers.
  """
  frames = (size.num_frames - 1) // vae.temporal_compression + 1
  extra = -frames % model.patch[0]
  scale = vae.spatial_compression
  shape = (frames + extra, size.height // scale, size.width // scale, model.out_channels)
  return shape, extra
