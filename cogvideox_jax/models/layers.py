"""The layers of the expert transformer (paper 2.2).

Text and vision tokens live in one row and share every weight but their modulation.
"""

from collections.abc import Callable

import jax
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from cogvideox_jax.models.layer_norm import LayerNorm
from cogvideox_jax.models.modulation import per_token
from cogvideox_jax.models.positions import rotate

Attention = Callable[..., Float[Array, "b n heads head_dim"]]
RotaryTable = tuple[Float[Array, "b n half"], Float[Array, "b n half"]]

# Names for rematerialization: of the outputs of all linear layers, and of the MLP's last one.
LINEAR, MLP_OUT = "linear", "mlp_out"
EPSILON = 1e-5
HEAD_NORM_EPSILON = 1e-6  # Of the norms of queries and keys.


class ExpertAdaLayerNorm(nnx.Module):
  """Layer norm whose shift, scale and gate depend on a clip's timestep and on the expert.

  Text and vision tokens share the norm; each expert has its own modulation. It starts at zero, so
  a new block is the identity. Weights: diffusers `CogVideoXLayerNormZero`.
  """

  def __init__(self, width: int, time_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    zeros = nnx.initializers.zeros
    self.norm = LayerNorm(width, EPSILON, dtype=dtype, rngs=rngs)
    self.modulation = nnx.Linear(time_width, 6 * width, kernel_init=zeros, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "b n d"],
    time: Float[Array, "b clips e"],
    segment_ids: Int[Array, "b n"],
    experts: Int[Array, "b n"],
  ) -> tuple[Float[Array, "b n d"], Float[Array, "b n d"]]:
    """Returns the modulated tokens, and the gate for the branch they are about to enter."""
    tables = rearrange(
      self.modulation(nnx.silu(time)), "b clips (two m d) -> m b (clips two) d", two=2, m=3
    )
    index = 2 * (segment_ids - 1) + experts
    shift, scale, gate = (per_token(table, index) for table in tables)
    # Stands once in memory: XLA would make it anew for each tile of the product that takes it.
    return jax.lax.optimization_barrier(self.norm(x) * (1 + scale) + shift), gate


def _named(x: Array) -> Array:
  """What a policy of rematerialization may save of the linear layers."""
  return checkpoint_name(x, LINEAR)


class SelfAttention(nnx.Module):
  """Attention of every token to all of its clip, text and vision alike (3D full attention)."""

  def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    head_dim = width // heads
    self.heads = heads
    # Not of shape [width, heads, head_dim]: heads of 64 would fill half of a TPU's lanes, and all
    # that is kept of a parameter twice its memory.
    self.query = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
    self.key = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
    self.value = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
    self.query_norm = LayerNorm(head_dim, HEAD_NORM_EPSILON, dtype=dtype, rngs=rngs)
    self.key_norm = LayerNorm(head_dim, HEAD_NORM_EPSILON, dtype=dtype, rngs=rngs)
    self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "b n d"],
    segment_ids: Int[Array, "b n"],
    rotary: RotaryTable | None,
    attention: Attention,
  ) -> Float[Array, "b n d"]:
    query, key, value = (
      rearrange(_named(project(x)), "b n (h e) -> b n h e", h=self.heads)
      for project in (self.query, self.key, self.value)
    )
    query, key = self.query_norm(query), self.key_norm(key)
    if rotary is not None:
      query, key = rotate(query, rotary), rotate(key, rotary)
    found = attention(query, key, value, segment_ids)
    return _named(self.out(rearrange(found, "b n h e -> b n (h e)")))


class MLP(nnx.Module):
  """Four times wider inside, tanh-approximated GELU."""

  def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    out = self.down(jax.nn.gelu(_named(self.up(x)), approximate=True))
    return checkpoint_name(_named(out), MLP_OUT)


class Block(nnx.Module):
  """Attention, then MLP, each between an expert norm and its gate (`CogVideoXBlock`)."""

  def __init__(self, width: int, heads: int, time_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.attention_norm = ExpertAdaLayerNorm(width, time_width, dtype=dtype, rngs=rngs)
    self.attention = SelfAttention(width, heads, dtype=dtype, rngs=rngs)
    self.mlp_norm = ExpertAdaLayerNorm(width, time_width, dtype=dtype, rngs=rngs)
    self.mlp = MLP(width, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "b n d"],
    time: Float[Array, "b clips e"],
    segment_ids: Int[Array, "b n"],
    experts: Int[Array, "b n"],
    rotary: RotaryTable | None,
    attention: Attention,
  ) -> Float[Array, "b n d"]:
    h, gate = self.attention_norm(x, time, segment_ids, experts)
    x = x + gate * self.attention(h, segment_ids, rotary, attention)
    h, gate = self.mlp_norm(x, time, segment_ids, experts)
    return x + gate * self.mlp(h)
