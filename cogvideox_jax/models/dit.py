"""The expert transformer over packed rows (paper 2.2; diffusers `CogVideoXTransformer3DModel`)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from cogvideox_jax.config_keys import AT_LEAST_ZERO, key
from cogvideox_jax.models import positions
from cogvideox_jax.models.layer_norm import STATISTICS, LayerNorm
from cogvideox_jax.models.layers import EPSILON, LINEAR, MLP_OUT, Attention, Block, RotaryTable
from cogvideox_jax.models.modulation import per_token
from cogvideox_jax.types import TEXT, TokenLayout

# What a block's backward pass finds saved of the forward pass, by name; the rest is computed again.
# `attention`: its outputs, so that its kernel runs once, and the small statistics of norms.
# `branches`: these and the MLP's outputs, with the block's input 3 tokens x width. `linear`: with
# those of all linear layers, 11. `offload`: what `attention` has and each block's input, in the
# host's memory.
REMAT: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
  # Inside a scan nothing can be shared between the passes, so CSE need not be prevented.
  "none": lambda run: run,
  "full": partial(jax.checkpoint, prevent_cse=False),
  "attention": partial(
    jax.checkpoint,
    prevent_cse=False,
    policy=jax.checkpoint_policies.save_only_these_names("attention", STATISTICS),
  ),
  "branches": partial(
    jax.checkpoint,
    prevent_cse=False,
    policy=jax.checkpoint_policies.save_only_these_names("attention", STATISTICS, MLP_OUT),
  ),
  "linear": partial(
    jax.checkpoint,
    prevent_cse=False,
    policy=jax.checkpoint_policies.save_only_these_names("attention", STATISTICS, LINEAR),
  ),
  "offload": partial(
    jax.checkpoint,
    prevent_cse=False,
    policy=jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[STATISTICS],
      names_which_can_be_offloaded=["block", "attention"],
      offload_src="device",
      offload_dst="pinned_host",
    ),
  ),
}
OFS = 2.0  # What the published 1.5-I2V was trained and is sampled with, always.


@dataclass(frozen=True)
class DiTConfig:
  """Sizes and the rule of positions; `configs/` hold the published ones."""

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
      choices=positions.RULES,
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
    """Whether it sees the latents of an image, in channels behind the noised ones."""
    return self.in_channels != self.out_channels

  @property
  def interpolations(self) -> tuple[float, float]:
    """In space and in time."""
    return self.spatial_interpolation, self.temporal_interpolation

  @property
  def base_grid(self) -> tuple[int, int, int]:
    """Patches (frames, height, width) of the sample size."""
    latents = (self.sample_frames - 1) // 4 + 1, self.sample_height, self.sample_width
    t, h, w = (size // patch for size, patch in zip(latents, self.patch, strict=True))
    return t, h, w


def timestep_sinusoid(timesteps: Num[Array, "..."], width: int) -> Float[Array, "... width"]:
  """Cosines, then sines, of a timestep in 0..999, in fp32 (diffusers `Timesteps`)."""
  half = width // 2
  frequency = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / half)
  angle = jnp.float32(timesteps)[..., None] * frequency
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def patchify(latents: Float[Array, "f h w c"], patch: tuple[int, int, int]) -> Float[Array, "n p"]:
  """Tokens in order of t, h, w; within a patch channels are slowest, then t, h, w."""
  pt, ph, pw = patch
  order = "(t pt) (h ph) (w pw) c -> (t h w) (c pt ph pw)"
  return rearrange(latents, order, pt=pt, ph=ph, pw=pw)


def unpatchify(
  tokens: Float[Array, "n p"], patch: tuple[int, int, int], grid: tuple[int, int, int]
) -> Float[Array, "f h w c"]:
  """The inverse of `patchify`; grid: patches along (t, h, w)."""
  (pt, ph, pw), (t, h, w) = patch, grid
  order = "(t h w) (c pt ph pw) -> (t pt) (h ph) (w pw) c"
  return rearrange(tokens, order, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)


class DiT(nnx.Module):
  """Predicts v of every vision token of packed rows.

  dtype: what it computes in; parameters are fp32 masters. remat: a name of REMAT.
  """

  def __init__(
    self,
    config: DiTConfig,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
  ):
    width, patch = config.width, math.prod(config.patch)
    self.config, self.dtype, self.remat = config, dtype, remat

    def linear(size: int, out: int, **options) -> nnx.Linear:
      return nnx.Linear(size, out, dtype=dtype, rngs=rngs, **options)

    @nnx.split_rngs(splits=config.depth)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def stack(rngs: nnx.Rngs) -> Block:
      return Block(width, config.heads, config.time_width, dtype=dtype, rngs=rngs)

    zeros = nnx.initializers.zeros
    self.vision_in = linear(config.in_channels * patch, width)
    self.text_in = linear(config.text_width, width)
    self.time_in = linear(width, config.time_width)
    self.time_out = linear(config.time_width, config.time_width)
    if config.ofs_width:
      self.ofs_in = linear(config.ofs_width, config.time_width)
      self.ofs_out = linear(config.time_width, config.time_width)
    if config.learned_positions:
      grid, scales = config.base_grid, config.interpolations
      self.position_table = nnx.Param(
        positions.initial_table(config.text_length, grid, width, scales)
      )
    self.blocks = stack(rngs)
    self.final_norm = LayerNorm(width, EPSILON, dtype=dtype, rngs=rngs)
    self.out_norm = LayerNorm(width, EPSILON, dtype=dtype, rngs=rngs)
    self.out_modulation = linear(config.time_width, 2 * width, kernel_init=zeros)
    self.out = linear(width, config.out_channels * patch, kernel_init=zeros)

  def __call__(
    self,
    vision: Float[Array, "b n p"],
    text: Float[Array, "b k l t"],
    time: Float[Array, "b s d"],
    layout: TokenLayout,
    *,
    attention: Attention,
    ofs: float | Float[Array, ""] = OFS,
  ) -> Float[Array, "b n q"]:
    """One evaluation. What comes out at text and padding tokens means nothing.

    Args:
      vision: noised patches, in front of an image's if it `takes_image`; whatever stands at text
        tokens is not read.
      time: each segment's timestep, as `timestep_sinusoid` of the transformer's width; padding,
        segment 0, is modulated as some clip.
      layout: which clip, expert and position each token belongs to.
      attention: function of query, key, value [b n heads head_dim] and segment_ids.
      ofs: read by models with an ofs_width only.
    """
    time = self.time_out(nnx.silu(self.time_in(time[:, 1:].astype(self.dtype))))
    if self.config.ofs_width:
      sinusoid = timestep_sinusoid(jnp.asarray(ofs), self.config.ofs_width).astype(self.dtype)
      time = time + self.ofs_out(nnx.silu(self.ofs_in(sinusoid)))
    x = self._embed(vision, text, layout)
    x = self._run_blocks(x, time, layout, attention)
    tables = rearrange(self.out_modulation(nnx.silu(time)), "b clips (m d) -> m b clips d", m=2)
    shift, scale = (per_token(table, layout.segment_ids - 1) for table in tables)
    return self.out(self.out_norm(self.final_norm(x)) * (1 + scale) + shift)

  def _embed(self, vision, text, layout: TokenLayout) -> Float[Array, "b n d"]:
    """Text and patches, each projected, side by side in the row."""
    segment_ids, experts, coordinates, grids = layout
    words = rearrange(self.text_in(text.astype(self.dtype)), "b k l d -> b (k l) d")
    # Padding has segment 0: clip it to some word, since it is never a text token.
    word = jnp.maximum(segment_ids - 1, 0) * text.shape[2] + coordinates[..., 0]
    word = jnp.clip(word, 0, words.shape[1] - 1)
    patches = self.vision_in(vision.astype(self.dtype))
    word = jnp.take_along_axis(words, word[..., None], axis=1)
    x = jnp.where((experts == TEXT)[..., None], word, patches)
    if self.config.positions != "sincos" and not self.config.learned_positions:
      return x
    scales = self.config.interpolations
    added = positions.sincos_table(coordinates, experts, self.config.width, *scales)
    if self.config.learned_positions:
      # The reference falls back on the computed table for clips of any other grid.
      grid, base = positions.grid_of_token(grids, segment_ids), self.config.base_grid
      row = positions.table_row(coordinates, experts, self.config.text_length, base)
      fits = (grid == jnp.asarray(base)).all(-1, keepdims=True)
      added = jnp.where(fits, jnp.take(self.position_table[...], row, axis=0), added)
    return x + added.astype(x.dtype)

  def _rotary(self, layout: TokenLayout) -> RotaryTable | None:
    rule = self.config.positions
    if rule == "sincos":
      return None
    segment_ids, experts, coordinates, grids = layout
    grid = positions.grid_of_token(grids, segment_ids)
    base, scales = self.config.base_grid[1:], self.config.interpolations
    where = positions.rotary_positions(rule, coordinates, grid, base, scales)
    return positions.rotary_table(where, experts, self.config.head_dim)

  def _run_blocks(self, x, time, layout: TokenLayout, attention) -> Float[Array, "b n d"]:
    rotary = self._rotary(layout)
    graphdef, stacked = nnx.split(self.blocks)

    def run(x, params):
      # The same layout in both passes: else TPUs turn what is saved, in each layer.
      x = with_layout_constraint(checkpoint_name(x, "block"), Layout(tuple(range(x.ndim))))
      block = nnx.merge(graphdef, params)
      return block(x, time, layout.segment_ids, layout.experts, rotary, attention), None

    return jax.lax.scan(REMAT[self.remat](run), x, stacked)[0]
