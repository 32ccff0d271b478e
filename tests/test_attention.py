"""Blockwise attention: against a dense masked softmax, and its memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cogvideox_jax.models.attention import BLOCK, _in_tiles, attention


def dense_attention(q, k, v, segment_ids):
  scores = jnp.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(q.shape[-1])
  same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
  weights = jax.nn.softmax(jnp.where(same, scores, -jnp.inf))
  return jnp.einsum("bhqk,bkhe->bqhe", weights, v)


def row(*lengths, n):
  """Segment ids of clips of these lengths, then padding."""
  ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  return np.pad(ids, (0, n - len(ids))).astype(np.int32)


# Only the rows of WHOLE, below, are a whole number of blocks.
SHORT = np.stack([row(30, 10, n=47), row(47, n=47), row(1, n=47), row(n=47)])
LONG = np.stack(
  [row(40, 72, 1, 104, 33, n=251), row(251, n=251), row(*[3] * 60, n=251), row(20, 200, n=251)]
)
# Long enough for tiles, of which a row has several; blocks are faster for the last two rows.
TILES = np.stack(
  [row(1600, n=1600), row(1000, 599, n=1600), row(*[50] * 30, n=1600), row(300, 9, 640, n=1600)]
)
WHOLE = np.stack([row(BLOCK, 2 * BLOCK, n=4 * BLOCK), row(2 * BLOCK, BLOCK - 1, n=4 * BLOCK)])


def drawn(segment_ids, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(0), (3, *segment_ids.shape, 2, 16), dtype)


@partial(jax.jit, static_argnums=0)
def value_and_grads(attend, q, k, v, segment_ids):
  """The output, and the gradients of an objective with a different weight for every number."""
  weights = jax.random.normal(jax.random.key(1), q.shape)

  def objective(q, k, v):
    out = attend(q, k, v, segment_ids)
    return (jnp.sin(out.astype(jnp.float32)) * weights).sum(), out

  grads, out = jax.grad(objective, (0, 1, 2), has_aux=True)(q, k, v)
  return (out, *grads)


@pytest.mark.parametrize(
  "segment_ids", [SHORT, LONG, WHOLE, TILES], ids=["short", "long", "whole", "tiles"]
)
def test_equals_dense_masked_softmax_in_values_and_gradients(segment_ids):
  q, k, v = drawn(segment_ids)
  ours = value_and_grads(attention, q, k, v, segment_ids)
  dense = value_and_grads(dense_attention, q, k, v, segment_ids)
  for a, b in zip(ours, dense, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_large_scores_neither_overflow_nor_vanish():
  q, k, v = drawn(LONG)
  ours = value_and_grads(attention, 100 * q, k, v, LONG)
  dense = value_and_grads(dense_attention, 100 * q, k, v, LONG)
  np.testing.assert_allclose(ours[0], dense[0], atol=5e-4)  # A score of 1000 rounds to 6e-5.
  assert all(np.isfinite(x).all() for x in ours)


def test_bfloat16_is_as_near_as_its_rounding():
  q, k, v = drawn(SHORT, jnp.bfloat16)
  ours = value_and_grads(attention, q, k, v, SHORT)
  exact = value_and_grads(dense_attention, *(x.astype(jnp.float32) for x in (q, k, v)), SHORT)
  for a, b in zip(ours, exact, strict=True):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2e-2)


def test_blocks_that_share_no_segment_are_never_computed():
  # A masked product would still spread a NaN, since 0 * NaN is NaN.
  segment_ids = np.stack([row(BLOCK, 2 * BLOCK, n=4 * BLOCK), row(n=4 * BLOCK)])
  q, k, v = drawn(segment_ids)
  clean = value_and_grads(attention, q, k, v, segment_ids)
  second = segment_ids == 2
  poisoned = (jnp.where(second[..., None, None], jnp.nan, x) for x in (q, k, v))
  for a, b in zip(value_and_grads(attention, *poisoned, segment_ids), clean, strict=True):
    assert np.isnan(a[second]).all()
    np.testing.assert_array_equal(a[~second], b[~second])


@pytest.mark.parametrize(
  "lengths, tiles", [([2048], 2), ([1000, 1048], 2), ([512] * 4, 32), ([32] * 64, 32)]
)
def test_long_clips_are_taken_in_tiles_and_short_ones_in_blocks(lengths, tiles):
  ids = jnp.asarray(row(*lengths, n=2048)).reshape(32, BLOCK)
  assert _in_tiles(lambda queries, keys: jnp.int32(len(queries)), 16, ids) == tiles


def test_memory_grows_with_the_tokens_not_their_square():
  n = 16_384
  x = jax.ShapeDtypeStruct((1, n, 1, 16), jnp.float32)
  ids = jax.ShapeDtypeStruct((1, n), jnp.int32)
  gradient = jax.grad(lambda *args: attention(*args).sum(), (0, 1, 2))
  memory = jax.jit(gradient).lower(x, x, x, ids).compile().memory_analysis()
  assert memory.temp_size_in_bytes < n * n / 8  # An eighth of a byte for each pair of tokens.


def layers(attend, q, k, v, segment_ids):
  def layer(x, _):
    return x + attend(x, k, v, segment_ids), None

  return jax.lax.scan(jax.checkpoint(layer), q, length=3)[0]


def test_a_scan_with_rematerialization_changes_nothing():
  q, k, v = drawn(SHORT)
  ours = value_and_grads(partial(layers, attention), q, k, v, SHORT)
  dense = value_and_grads(partial(layers, dense_attention), q, k, v, SHORT)
  for a, b in zip(ours, dense, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_rows_split_over_devices_give_the_same():
  q, k, v = drawn(LONG)
  mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
  split = jax.shard_map(attention, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
  ours = value_and_grads(split, q, k, v, LONG)
  for a, b in zip(ours, value_and_grads(attention, q, k, v, LONG), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_clip_gives_the_same_alone_and_in_a_row():
  q, k, v = drawn(LONG)
  packed = jax.jit(attention)(q, k, v, LONG)
  clip = np.s_[:1, 113:217]
  alone = jax.jit(attention)(q[clip], k[clip], v[clip], np.ones((1, 104), np.int32))
  np.testing.assert_allclose(packed[clip], alone, atol=1e-6)
