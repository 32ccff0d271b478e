"""The layers of the expert transformer (paper 2.2).

Text and vision tokens share a row and every weight but their modulation.
"""

from collections.abc import Callable
from functools import partial

import jax
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cogvideox_jax.models.layer_norm import LayerNorm
from cogvideox_jax.models.modulation import per_token
from cogvideox_jax.models.rematerialization import LINEAR, MLP_OUT
from cogvideox_jax.models.rotary import RotaryTable, rotate
from cogvideox_jax.types import TokenLayout

# A function of query, key, value [b n heads head_dim] and segment_ids [b n].
Attention = Callable[..., Float[Array, "b n heads head_dim"]]

EPSILON = 1e-5
HEAD_NORM_EPSILON = 1e-6  # The epsilon of the norms of queries and keys.


class ExpertAdaLayerNorm(nnx.Module):
  """Layer norm whose shift, scale and gate depend on a clip's timestep and on the expert.

  Text and vision tokens share the norm; each expert has a modulation of its own. It starts at zero,
  so that a new block is the identity. Weights: diffusers `CogVideoXLayerNormZero`.
  """

  def __init__(self, width: int, time_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    zeros = nnx.initializers.zeros
    self.norm = LayerNorm(width, EPSILON, dtype=dtype, rngs=rngs)
    self.modulation = nnx.Linear(time_width, 6 * width, kernel_init=zeros, dtype=dtype, rngs=rngs)

  def __call__(
    self, x: Float[Array, "b n d"], time: Float[Array, "b clips e"], layout: TokenLayout
  ) -> tuple[Float[Array, "b n d"], Float[Array, "b n d"]]:
    """Returns the modulated tokens, and the gate of the branch that they enter next."""
    tables = rearrange(
      self.modulation(nnx.silu(time)), "b clips (two m d) -> m b (clips two) d", two=2, m=3
    )
    index = 2 * (layout.segment_ids - 1) + layout.experts
    shift, scale, gate = (per_token(table, index) for table in tables)
    # The barrier stores the result once: XLA would compute it again for each tile of the product
    # that reads it.
    return jax.lax.optimization_barrier(self.norm(x) * (1 + scale) + shift), gate


def _linear_out(x: Array) -> Array:
  """Names the output of a linear layer for rematerialization."""
  return checkpoint_name(x, LINEAR)


class SelfAttention(nnx.Module):
  """Attention of every token to all tokens of its clip, text and vision (3D full attention)."""

  def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    head_dim = width // heads
    self.heads = heads
    # Kernels are [width, width], not [width, heads, head_dim], because a last axis of 64 fills half
    # of a TPU's 128 lanes: parameters and optimizer state would take twice their memory.
    self.query = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
    self.key = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
    self.value = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
    self.query_norm = LayerNorm(head_dim, HEAD_NORM_EPSILON, dtype=dtype, rngs=rngs)
    self.key_norm = LayerNorm(head_dim, HEAD_NORM_EPSILON, dtype=dtype, rngs=rngs)
    self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "b n d"],
    layout: TokenLayout,
    rotation: RotaryTable | None,
    attention: Attention,
  ) -> Float[Array, "b n d"]:
    query, key, value = (
      rearrange(_linear_out(project(x)), "b n (h e) -> b n h e", h=self.heads)
      for project in (self.query, self.key, self.value)
    )
    query, key = self.query_norm(query), self.key_norm(key)
    if rotation is not None:
      query, key = rotate(query, rotation), rotate(key, rotation)
    out = attention(query, key, value, layout.segment_ids)
    return _linear_out(self.out(rearrange(out, "b n h e -> b n (h e)")))


class MLP(nnx.Module):
  """Four times wider inside, tanh-approximated GELU."""

  def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    out = self.down(jax.nn.gelu(_linear_out(self.up(x)), approximate=True))
    return checkpoint_name(_linear_out(out), MLP_OUT)


class Block(nnx.Module):
  """Attention, then MLP, each between an expert norm and its gate (`CogVideoXBlock`).

  `expert_norm` and `self.attention` below are the only places that choose how experts and attention
  work: a variant is a module with the same call.
  """

  def __init__(self, width: int, heads: int, time_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    expert_norm = partial(ExpertAdaLayerNorm, width, time_width, dtype=dtype, rngs=rngs)
    self.attention_norm = expert_norm()
    self.attention = SelfAttention(width, heads, dtype=dtype, rngs=rngs)
    self.mlp_norm = expert_norm()
    self.mlp = MLP(width, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "b n d"],
    time: Float[Array, "b clips e"],
    layout: TokenLayout,
    rotation: RotaryTable | None,
    attention: Attention,
  ) -> Float[Array, "b n d"]:
    h, gate = self.attention_norm(x, time, layout)
    x = x + gate * self.attention(h, layout, rotation, attention)
    h, gate = self.mlp_norm(x, time, layout)
    return x + gate * self.mlp(h)
