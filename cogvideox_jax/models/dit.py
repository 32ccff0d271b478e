"""The expert transformer over packed rows (paper 2.2; diffusers `CogVideoXTransformer3DModel`)."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.layer_norm import LayerNorm
from cogvideox_jax.models.layers import EPSILON, Attention, Block
from cogvideox_jax.models.modulation import per_token
from cogvideox_jax.models.position_encoding import added, rotation
from cogvideox_jax.models.rematerialization import BLOCK_INPUT, REMAT
from cogvideox_jax.models.rotary import RotaryTable
from cogvideox_jax.models.sincos import initial_table
from cogvideox_jax.types import TEXT, TokenLayout

OFS = 2.0  # The published 1.5-I2V was trained with this value, and is always sampled with it.


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

  dtype: the type of the computation; parameters are fp32 masters. remat: a key of REMAT.
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
      self.position_table = nnx.Param(
        initial_table(config.text_length, config.base_grid, width, config.interpolations)
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
    """Evaluates the network once. The outputs at text and padding tokens mean nothing.

    Args:
      vision: noised patches, followed by those of an image if the model `takes_image`; the values
        at text tokens are not read.
      time: the timestep of each segment as `timestep_sinusoid` of the transformer's width. Padding,
        segment 0, gets the modulation of some clip.
      layout: the clip, expert and position of each token.
      attention: function of query, key, value [b n heads head_dim] and segment_ids.
      ofs: read by models with an ofs_width only.
    """
    time = self._embed_time(time, ofs)
    x = self._embed(vision, text, layout)
    x = self._run_blocks(x, time, layout, rotation(self.config, layout), attention)
    tables = rearrange(self.out_modulation(nnx.silu(time)), "b clips (m d) -> m b clips d", m=2)
    shift, scale = (per_token(table, layout.segment_ids - 1) for table in tables)
    return self.out(self.out_norm(self.final_norm(x)) * (1 + scale) + shift)

  def _embed_time(
    self, time: Float[Array, "b s d"], ofs: float | Float[Array, ""]
  ) -> Float[Array, "b clips e"]:
    """The time embedding of each clip, with that of `ofs` added if the model takes it."""
    time = self.time_out(nnx.silu(self.time_in(time[:, 1:].astype(self.dtype))))
    if self.config.ofs_width:
      sinusoid = timestep_sinusoid(jnp.asarray(ofs), self.config.ofs_width).astype(self.dtype)
      time = time + self.ofs_out(nnx.silu(self.ofs_in(sinusoid)))
    return time

  def _embed(
    self, vision: Float[Array, "b n p"], text: Float[Array, "b k l t"], layout: TokenLayout
  ) -> Float[Array, "b n d"]:
    """Projects text and patches, puts each where its token is in the row, and adds positions."""
    words = rearrange(self.text_in(text.astype(self.dtype)), "b k l d -> b (k l) d")
    # Padding has segment 0 and is never a text token: it is clipped to some word.
    word = jnp.maximum(layout.segment_ids - 1, 0) * text.shape[2] + layout.coordinates[..., 0]
    word = jnp.clip(word, 0, words.shape[1] - 1)
    patches = self.vision_in(vision.astype(self.dtype))
    word = jnp.take_along_axis(words, word[..., None], axis=1)
    x = jnp.where((layout.experts == TEXT)[..., None], word, patches)
    learned = jnp.asarray(self.position_table[...]) if self.config.learned_positions else None
    vectors = added(self.config, layout, learned)
    return x if vectors is None else x + vectors.astype(x.dtype)

  def _run_blocks(
    self,
    x: Float[Array, "b n d"],
    time: Float[Array, "b clips e"],
    layout: TokenLayout,
    rotary: RotaryTable | None,
    attention: Attention,
  ) -> Float[Array, "b n d"]:
    graphdef, stacked = nnx.split(self.blocks)

    def run(x, params):
      # One layout for both passes: else TPUs transpose what is saved, in each layer.
      x = with_layout_constraint(checkpoint_name(x, BLOCK_INPUT), Layout(tuple(range(x.ndim))))
      block = nnx.merge(graphdef, params)
      return block(x, time, layout, rotary, attention), None

    return jax.lax.scan(REMAT[self.remat].wrap(run), x, stacked)[0]
