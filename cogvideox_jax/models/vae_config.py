"""The sizes of the VAE and the scales of its latents."""

import math
from dataclasses import dataclass, field

from cogvideox_jax.config_keys import key
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.tiling import Tiling

# What the latents of an image are multiplied by. `scaled` is the scaling factor s; `raw` is 1;
# `diffusers` is s, but 1/s for 1.5. The code paths for 1.5 disagree: SAT trains with s and samples
# with 1, diffusers samples with 1/s ("the team forgot to multiply in training"), and users report
# that 1 looks best. All that is published of 1.0 uses s.
IMAGE_SCALES = ("scaled", "raw", "diffusers")


@dataclass(frozen=True)
class VAEConfig:
  """Sizes of the VAE; the defaults are those of every published model."""

  in_channels: int = field(default=3, metadata=key("Channels of pixels."))
  channels: tuple[int, ...] = field(
    default=(128, 256, 256, 512),
    metadata=key("Channels of each level, finest first.", form="hold numbers, such as (16, 32)"),
  )
  latent_channels: int = field(default=16, metadata=key("Channels of latents."))
  resnets: int = field(
    default=3, metadata=key("ResNet blocks in each level of the encoder; the decoder has one more.")
  )
  groups: int = field(
    default=32, metadata=key("Groups of the group norms; divides every number of channels.")
  )
  temporal_compression: int = field(
    default=4,
    metadata=key("Frames to a latent frame, a power of 2; the finest levels compress time."),
  )
  scaling_factor: float = 0.7  # Latents times this have about unit variance; 1.15258426 for 2B.
  invert_scale_latents: bool = False  # 1.5: image latents are divided by it, as diffusers reads it.
  sample_height: int = 480  # Pixels; tiles are half of it, and of the width.
  sample_width: int = 720

  def image_scale(self, choice: str) -> float:
    """The number that the latents of an image are multiplied by; choice: one of IMAGE_SCALES."""
    if choice == "raw":
      return 1.0
    inverts = choice == "diffusers" and self.invert_scale_latents
    return 1 / self.scaling_factor if inverts else self.scaling_factor

  @property
  def spatial_compression(self) -> int:
    return 2 ** (len(self.channels) - 1)

  @property
  def tiling(self) -> Tiling:
    """Tiles of half the sample size, as diffusers' `enable_tiling` cuts them."""
    return Tiling.of(self.sample_height // 2, self.sample_width // 2, self.spatial_compression)

  @property
  def temporal_levels(self) -> int:
    """How many of the finest levels compress time."""
    return int(math.log2(self.temporal_compression))


def check(config: VAEConfig) -> None:
  """Raises a UserError for sizes of which no VAE can be made."""
  levels, compression = len(config.channels), config.temporal_compression
  if 2**config.temporal_levels != compression:
    raise UserError(f"temporal_compression is {compression}; it must be a power of 2.")
  if config.temporal_levels >= levels:
    raise UserError(
      f"temporal_compression is {compression}, but {levels} levels compress time at most "
      f"{2 ** (levels - 1)} times.\nGive more channels, a number for each level, or compress less."
    )
  if odd := [width for width in config.channels if width % config.groups]:
    raise UserError(f"groups is {config.groups}, which does not divide {odd[0]} of channels.")
