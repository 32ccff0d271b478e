"""The encoder of T5 v1.1, whose text states condition the transformer.

Raffel et al., arXiv:1910.10683, with the gated GELU of v1.1 (arXiv:2002.05202); transformers
`T5EncoderModel`. CogVideoX uses no mask: tokens attend to padding, and the states of padding
condition the transformer, too.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from cogvideox_jax.models.precision import exact_in_float32

EPSILON = 1e-6


@dataclass(frozen=True)
class T5Config:
  """Sizes of the encoder; the defaults are those of google/t5-v1_1-xxl."""

  vocab: int = 32128
  width: int = 4096
  head_dim: int = 64
  heads: int = 64  # heads * head_dim may differ from width.
  mlp_width: int = 10240
  depth: int = 24
  buckets: int = 32  # Buckets of relative positions, half for each direction.
  max_distance: int = 128  # From this distance on, in tokens, all share one bucket.


def _normal(std: float) -> nnx.Initializer:
  return nnx.initializers.normal(std)


def _linear(inputs: int, outputs: int, std: float, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
  init = _normal(std)
  return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)


def _norm(config: T5Config, dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
  return nnx.RMSNorm(config.width, epsilon=EPSILON, dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
  """Self-attention without scaled logits: queries start smaller instead."""

  def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
    width, inner = config.width, config.heads * config.head_dim
    self.heads = config.heads
    self.query = _linear(width, inner, (width * config.head_dim) ** -0.5, dtype, rngs)
    self.key = _linear(width, inner, width**-0.5, dtype, rngs)
    self.value = _linear(width, inner, width**-0.5, dtype, rngs)
    self.out = _linear(inner, width, inner**-0.5, dtype, rngs)

  def __call__(
    self, x: Float[Array, "b l t"], bias: Float[Array, "*b heads l l"]
  ) -> Float[Array, "b l t"]:
    query, key, value = (
      rearrange(project(x), "b l (h k) -> b l h k", h=self.heads)
      for project in (self.query, self.key, self.value)
    )
    logits = jnp.einsum("bqhk,blhk->bhql", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits + bias, axis=-1).astype(value.dtype)
    found = jnp.einsum("bhql,blhk->bqhk", weights, value)
    return self.out(rearrange(found, "b q h k -> b q (h k)"))


class GatedMLP(nnx.Module):
  """An MLP whose hidden values are multiplied by a gate, tanh-approximated GELU."""

  def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
    width, inner = config.width, config.mlp_width
    self.gate = _linear(width, inner, width**-0.5, dtype, rngs)
    self.up = _linear(width, inner, width**-0.5, dtype, rngs)
    self.down = _linear(inner, width, inner**-0.5, dtype, rngs)

  def __call__(self, x: Float[Array, "b l t"]) -> Float[Array, "b l t"]:
    return self.down(nnx.gelu(self.gate(x), approximate=True) * self.up(x))


class Block(nnx.Module):
  """Attention, then MLP, each after an RMS norm and beside a residual connection."""

  def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.attention_norm = _norm(config, dtype, rngs)
    self.attention = Attention(config, dtype=dtype, rngs=rngs)
    self.mlp_norm = _norm(config, dtype, rngs)
    self.mlp = GatedMLP(config, dtype=dtype, rngs=rngs)

  @exact_in_float32
  def __call__(
    self, x: Float[Array, "b l t"], bias: Float[Array, "*b heads l l"]
  ) -> Float[Array, "b l t"]:
    x += self.attention(self.attention_norm(x), bias)
    return x + self.mlp(self.mlp_norm(x))


class T5Encoder(nnx.Module):
  """Turns token ids into text states.

  dtype: the type of the computation; softmax and norms are float32 inside. Weights start as in T5,
    with standard deviations that follow from each layer's width.
  """

  def __init__(self, config: T5Config, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
    self.config = config
    self.embedding = nnx.Embed(
      config.vocab, config.width, dtype=dtype, embedding_init=_normal(1.0), rngs=rngs
    )
    self.relative_bias = nnx.Embed(
      config.buckets, config.heads, embedding_init=_normal(config.width**-0.5), rngs=rngs
    )

    @nnx.split_rngs(splits=config.depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: nnx.Rngs) -> Block:
      return Block(config, dtype=dtype, rngs=rngs)

    self.blocks = stack(rngs)
    self.final_norm = _norm(config, dtype, rngs)

  def __call__(
    self, ids: Int[Array, "b l"], mask: Int[Array, "b l"] | None = None
  ) -> Float[Array, "b l t"]:
    """Returns the states of all tokens, those of padding included.

    mask: 1 for tokens that are attended to, else 0; CogVideoX passes none.
    """
    buckets = relative_buckets(ids.shape[1], self.config.buckets, self.config.max_distance)
    bias = jnp.moveaxis(self.relative_bias(jnp.asarray(buckets)), -1, 0)  # One for all layers.
    if mask is not None:
      bias = jnp.where(mask[:, None, None, :], bias, jnp.finfo(bias.dtype).min)
    graphdef, params = nnx.split(self.blocks)

    def layer(x, params):
      return nnx.merge(graphdef, params)(x, bias), None

    x, _ = jax.lax.scan(layer, self.embedding(ids), params)
    return self.final_norm(x)


@partial(jax.jit, static_argnames="graphdef")
def encode_text(
  params: dict[str, Any], ids: Int[Array, "b l"], *, graphdef: nnx.GraphDef
) -> Float[Array, "b l t"]:
  """The text states of token ids, from an encoder's structure and its parameters."""
  return nnx.merge(graphdef, params)(ids)


def relative_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "l l"]:
  """The bucket of each pair (query, key) of a text of `length` tokens.

  Near pairs have a bucket for each distance; farther ones share buckets that grow logarithmically
  up to max_distance. The upper half of the buckets is for keys after the query.
  """
  relative = np.arange(length)[None, :] - np.arange(length)[:, None]
  half = buckets // 2
  exact = half // 2
  distance = np.abs(relative)
  # In float32 and in this order, because the reference rounds so at the borders between buckets.
  logs = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
  logs = logs / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
  far = exact + logs.astype(np.int32)
  within = np.where(distance < exact, distance, np.minimum(far, half - 1))
  return (np.where(relative > 0, half, 0) + within).astype(np.int32)
