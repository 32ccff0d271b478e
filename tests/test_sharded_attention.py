"""Attention over rows whose tokens and heads are split over devices, against one device."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import row, value_and_grads

from cogvideox_jax import sharding
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.attention import attention
from cogvideox_jax.models.kernels import segment_attention
from cogvideox_jax.models.kernels.block_grid import BlockSizes
from cogvideox_jax.sharded_attention import shard_attention

IDS = np.stack([row(50, 1, 13, n=96), row(96, n=96)])
INTERPRETED = partial(segment_attention.attention, sizes=BlockSizes(128, 128), interpret=True)


def mesh_of(**sizes):
  sizes = {axis: sizes.get(axis, 1) for axis in sharding.MESH_AXES}
  return sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


@pytest.mark.parametrize(
  ("name", "sizes", "heads", "attend"),
  [
    ("fsdp", {"data": 2, "context": 2}, 4, attention),
    ("fsdp", {"context": 2}, 3, attention),  # Zeros fill up the fourth head.
    ("fsdp", {"context": 4}, 2, INTERPRETED),
    ("fsdp_tensor", {"context": 2, "tensor": 2}, 6, attention),
    ("fsdp", {"context": 2, "tensor": 2}, 2, attention),  # `tensor` does not split heads here.
    ("fsdp_tensor", {"data": 2, "tensor": 2}, 2, INTERPRETED),
  ],
)
def test_split_rows_give_the_values_and_gradients_of_whole_ones(name, sizes, heads, attend):
  q, k, v = jax.random.normal(jax.random.key(0), (3, *IDS.shape, heads, 16))
  split = shard_attention(attend, mesh_of(**sizes), sharding.rules_named(name))
  ours = jax.block_until_ready(value_and_grads(split, q, k, v, IDS))
  for a, b in zip(ours, value_and_grads(attention, q, k, v, IDS), strict=True):
    np.testing.assert_allclose(a, b, atol=5e-6)


def test_a_row_that_does_not_divide_is_given_a_length_that_does():
  mesh, rules = mesh_of(context=4), sharding.rules_named("fsdp")
  x, ids = jnp.ones((1, 94, 4, 16)), jnp.ones((1, 94), jnp.int32)
  with pytest.raises(UserError, match=r"94 tokens does not divide over context .*\n.*128"):
    shard_attention(attention, mesh, rules)(x, x, x, ids)
  assert sharding.padded_tokens(94, mesh, rules) == 128
  assert sharding.padded_tokens(94, mesh_of(tensor=2), rules) == 94


def test_heads_are_swapped_for_tokens_and_nothing_is_gathered():
  x = jax.ShapeDtypeStruct((1, 96, 4, 16), jnp.float32)
  ids = jax.ShapeDtypeStruct((1, 96), jnp.int32)
  split = shard_attention(attention, mesh_of(context=4), sharding.rules_named("fsdp"))
  program = jax.jit(split).lower(x, x, x, ids).as_text()
  assert program.count("stablehlo.all_to_all") == 4
  assert "all_gather" not in program


def test_heads_that_do_not_divide_are_refused():
  mesh, rules = mesh_of(tensor=4), sharding.rules_named("fsdp_tensor")
  attend = shard_attention(lambda q, k, v, ids: q, mesh, rules)
  x, ids = jnp.ones((2, 8, 6, 16)), jnp.ones((2, 8), jnp.int32)  # 4 divides the 96 columns.
  with pytest.raises(UserError, match="6 heads do not divide over tensor"):
    attend(x, x, x, ids)
