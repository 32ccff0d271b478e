"""The sizes of the transformer and its rule of positions."""

from dataclasses import dataclass, field

from cogvideox_jax.config_keys import AT_LEAST_ZERO, key
from cogvideox_jax.models.positions import RULES


@dataclass(frozen=True)
class DiTConfig:
  """What the published transformers differ in; `configs/` holds their values."""

  depth: int = field(metadata=key("Blocks.", "paper Table 6, published num_layers"))
  heads: int = field(
    metadata=key("Heads of attention.", "published num_attention_heads; paper Table 6 prints 32")
  )
  head_dim: int = field(
    metadata=key("Width of a head, a multiple of 16.", "published attention_head_dim")
  )
  time_width: int = field(
    metadata=key("Width of the timestep's embedding.", "published time_embed_dim")
  )
  in_channels: int = field(
    metadata=key(
      "Latent channels that the model sees: out_channels, or twice that with an image's latents "
      "behind the noised ones.",
      "published in_channels",
    )
  )
  out_channels: int = field(
    metadata=key("Latent channels that the model returns.", "published out_channels")
  )
  patch: tuple[int, int, int] = field(
    metadata=key(
      "Size of a patch: latent frames, height, width. The published models have 1 or 2, 2, 2.",
      "published patch_size_t, patch_size",
      form="hold three whole numbers, such as (1, 2, 2)",
    )
  )
  text_width: int = field(
    metadata=key("Width of the text encoder's states.", "published text_embed_dim")
  )
  text_length: int = field(
    metadata=key("Text tokens of a clip, T5's padding included.", "published max_text_seq_length")
  )
  positions: str = field(
    metadata=key(
      "Rule of positions. sincos: added tables (2B); rope: rotary, rescaled to the sample size "
      "(5B); rope_index: rotary, plain indices (1.5); rope_scaled: rotary, divided by the "
      "interpolations.",
      "published use_rotary_positional_embeddings",
      choices=RULES,
    )
  )
  sample_frames: int = field(
    metadata=key("Pixel frames that a sampler makes by default.", "published sample_frames")
  )
  sample_height: int = field(
    metadata=key(
      "Latent height that a sampler makes by default; rope rescales its positions to it.",
      "published sample_height",
    )
  )
  sample_width: int = field(
    metadata=key(
      "Latent width that a sampler makes by default; rope rescales its positions to it.",
      "published sample_width",
    )
  )
  spatial_interpolation: float = field(
    metadata=key(
      "What sincos and rope_scaled divide positions in space by.",
      "published spatial_interpolation_scale",
    )
  )
  temporal_interpolation: float = field(
    metadata=key(
      "What sincos and rope_scaled divide positions in time by.",
      "published temporal_interpolation_scale",
    )
  )
  learned_positions: bool = field(
    default=False,
    metadata=key(
      "Whether a trained table of positions is added. It fixes clips to the sample size. Of the "
      "published models only 5B-I2V has one.",
      "published use_learned_positional_embeddings",
    ),
  )
  ofs_width: int = field(
    default=0,
    metadata=key(
      "Width of the sinusoids of the constant `ofs`; 0: the model has none. 512 in 1.5-5B-I2V.",
      "published ofs_embed_dim",
      allowed=AT_LEAST_ZERO,
    ),
  )

  @property
  def width(self) -> int:
    return self.heads * self.head_dim

  @property
  def takes_image(self) -> bool:
    """Whether the model sees the latents of an image, in channels after the noised ones."""
    return self.in_channels != self.out_channels

  @property
  def interpolations(self) -> tuple[float, float]:
    """The interpolation in space and the one in time."""
    return self.spatial_interpolation, self.temporal_interpolation

  @property
  def base_grid(self) -> tuple[int, int, int]:
    """Patches (frames, height, width) of the sample size."""
    latents = (self.sample_frames - 1) // 4 + 1, self.sample_height, self.sample_width
    t, h, w = (size // patch for size, patch in zip(latents, self.patch, strict=True))
    return t, h, w
