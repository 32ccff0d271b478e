"""The attention kernels for TPUs: interpreted, against dense attention; and compiled for TPUs."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding
from test_attention import dense_attention, drawn, row, value_and_grads

from cogvideox_jax.errors import UserError
from cogvideox_jax.models import attention as plain
from cogvideox_jax.models.backends import attention_for
from cogvideox_jax.models.kernels import segment_attention, segment_attention_forward
from cogvideox_jax.models.kernels.block_grid import BlockSizes, fit_blocks
from cogvideox_jax.models.kernels.segment_attention_backward import Residuals, backward
from cogvideox_jax.models.rematerialization import ATTENTION

interpreted = partial(segment_attention.attention, sizes=BlockSizes(128, 128), interpret=True)


# Rows of many clips and of one, with padding and without, of no whole number of blocks.
ROWS = np.stack([row(*[9] * 20, 211, 1, 88, n=700), row(300, n=700), row(700, n=700)])


@pytest.mark.parametrize(
  "sizes",
  [pytest.param(BlockSizes(128, 128), marks=pytest.mark.slow), BlockSizes(256, 128)],
)
def test_equals_dense_masked_softmax_in_values_and_gradients(sizes):
  q, k, v = drawn(ROWS)
  ours = value_and_grads(partial(interpreted, sizes=sizes), q, k, v, ROWS)
  for a, b in zip(ours, value_and_grads(dense_attention, q, k, v, ROWS), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_bfloat16_is_as_near_as_its_rounding():
  q, k, v = drawn(ROWS, jnp.bfloat16)
  ours = value_and_grads(interpreted, q, k, v, ROWS)
  exact = (x.astype(jnp.float32) for x in (q, k, v))
  for a, b in zip(ours, value_and_grads(dense_attention, *exact, ROWS), strict=True):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2e-2)


def sized(*largest):
  """Queries, keys and values of heads whose scores are at most `largest`, one number a head."""
  q, k, v = drawn(ROWS)
  longest = jnp.sqrt(jnp.square(jnp.stack([q, k])).sum(-1).max((1, 2)))[:, :, None]
  return q / longest[0] * jnp.array(largest)[:, None] * 4, k / longest[1], v


def test_scores_of_any_size_neither_overflow_nor_vanish():
  q, k, v = sized(59.9, 1000)  # Up to 60 no maximum is subtracted.
  ours = value_and_grads(interpreted, q, k, v, ROWS)
  dense = value_and_grads(dense_attention, q, k, v, ROWS)
  assert all(np.isfinite(x).all() for x in ours)
  np.testing.assert_allclose(ours[0], dense[0], atol=5e-4)
  for a, b in zip(ours, dense, strict=True):
    np.testing.assert_allclose(a[..., 0, :], b[..., 0, :], atol=1e-4)


def test_the_maximum_is_subtracted_only_where_scores_may_be_large(monkeypatch):
  monkeypatch.setattr(segment_attention_forward, "_SAFE_SCORE", 500)
  out = interpreted(*sized(400, 1000), jnp.asarray(ROWS))
  assert not np.isfinite(out[..., 0, :]).all()
  assert np.isfinite(out[..., 1, :]).all()


def many_blocks(longest):
  """Queries, keys and values of one head, and the segments of a row of 130 blocks."""
  segment_ids = row(*[600] * 20, longest, 1, 99, n=130 * 128)[None]
  return *drawn(segment_ids)[..., :1, :], segment_ids


def test_a_row_may_have_more_blocks_than_a_byte_counts():
  q, k, v, segment_ids = many_blocks(600)
  ids = jnp.asarray(segment_ids)
  np.testing.assert_allclose(interpreted(q, k, v, ids), plain.attention(q, k, v, ids), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("longest", [600, 2400])
def test_the_gradients_of_a_row_of_many_blocks_are_right(longest):
  q, k, v, segment_ids = many_blocks(longest)
  ours = value_and_grads(interpreted, q, k, v, segment_ids)
  for a, b in zip(ours, value_and_grads(plain.attention, q, k, v, segment_ids), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def backward_of(segment_ids, **options):
  """The gradients that the kernel finds of drawn numbers, and those of a dense masked softmax."""
  q, k, v, do = jax.random.normal(jax.random.key(0), (4, 2, 16, len(segment_ids)))
  ids = jnp.where(segment_ids == 0, 99, segment_ids)
  same = ids[:, None] == ids

  def scores(q, k):
    return jnp.where(same, jnp.einsum("heq,hek->hqk", q, k) / 4, -jnp.inf)

  def attend(q, k, v):
    return jnp.einsum("hqk,hek->heq", jax.nn.softmax(scores(q, k)), v)

  out, pull_back = jax.vjp(attend, q, k, v)
  residuals = Residuals(q, k, v, ids, out, jax.nn.logsumexp(scores(q, k), axis=-1))
  return backward(residuals, do, BlockSizes(128, 128), 6, **options), pull_back(do)


@pytest.mark.parametrize(
  "blocks",
  [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow)],
  ids="blocks_{}".format,
)
def test_queries_whose_gradient_exceeds_its_memory_are_taken_in_spans(blocks):
  segment_ids = row(100, 400, 60, n=6 * 128)
  ours, dense = backward_of(segment_ids, interpret=True, dq_bytes=blocks * 128 * 16 * 4)
  for a, b in zip(ours, dense, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_copies_to_main_memory_are_waited_for():
  # The interpreter copies when the kernel waits for the copy; until then the memory is NaN.
  ours, dense = backward_of(row(300, 80, 250, n=6 * 128), interpret=pltpu.InterpretParams())
  for a, b in zip(ours, dense, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_blocks_that_share_no_segment_are_never_computed():
  # A masked product would still spread a NaN, since 0 * NaN is NaN.
  segment_ids = np.stack([row(128, 256, n=512), row(n=512)])
  q, k, v = drawn(segment_ids)
  clean = value_and_grads(interpreted, q, k, v, segment_ids)
  second = segment_ids == 2
  poisoned = (jnp.where(second[..., None, None], jnp.nan, x) for x in (q, k, v))
  for a, b in zip(value_and_grads(interpreted, *poisoned, segment_ids), clean, strict=True):
    assert np.isnan(a[second]).all()
    np.testing.assert_array_equal(a[~second], b[~second])


def test_key_blocks_that_share_no_segment_with_the_queries_are_never_computed():
  # The second block of 256 holds both segments; the first block needs only its first key block.
  sizes, segment_ids = BlockSizes(256, 128), row(384, 128, n=512)[None]
  q, k, v = drawn(segment_ids)
  poisoned = (jnp.where(segment_ids[..., None, None] == 2, jnp.nan, x) for x in (q, k, v))
  attend = partial(interpreted, sizes=sizes)
  clean = value_and_grads(attend, q, k, v, segment_ids)
  out, dq, dk, _ = value_and_grads(attend, *poisoned, segment_ids)
  np.testing.assert_array_equal(out[:, :256], clean[0][:, :256])
  np.testing.assert_array_equal(dq[:, :256], clean[1][:, :256])
  assert np.isnan(dk[:, 256:]).any()


def test_nothing_beyond_the_end_of_the_last_tile_of_keys_is_used():
  # The second tile of 256 keys has only 128 in the row; memory that was not written is NaN.
  segment_ids = row(150, 234, n=384)
  q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 16, 384))
  attend = partial(
    segment_attention_forward.forward, q, k, v, jnp.asarray(segment_ids), BlockSizes(128, 128), 2
  )
  ours, dense = attend(interpret=pltpu.InterpretParams()), attend(interpret=True)
  assert segment_attention_forward.key_tile(384, 128) == 256
  for a, b in zip(ours, dense, strict=True):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
  ("attend", "call"),
  [(plain.attention, "cond["), (interpreted, "name=attention_forward")],
  ids=["plain", "kernel"],
)
def test_a_policy_may_save_what_the_backward_pass_needs(attend, call):
  q, k, v = drawn(ROWS)
  ids = jnp.asarray(ROWS)

  def count(policy):
    layer = jax.checkpoint(lambda q: jnp.sin(attend(q, k, v, ids)).sum(), policy=policy)
    return str(jax.make_jaxpr(jax.grad(layer))(q)).count(call)

  saved = jax.checkpoint_policies.save_only_these_names(ATTENTION)
  assert count(saved) == count(None) - 1


def test_each_block_is_padded_by_less_than_the_lanes():
  largest = BlockSizes(1024, 256)
  assert fit_blocks(300, largest) == (384, 384)
  assert fit_blocks(1100, largest) == (640, 640)
  assert fit_blocks(75_776, largest) == largest
  assert fit_blocks(17_776, largest) == largest
  assert fit_blocks(1500, largest) == (768, 256)


def test_a_device_gets_its_own_attention_and_the_same_one_each_time():
  v5p, v6e, unknown = (
    SimpleNamespace(platform="tpu", device_kind=kind)
    for kind in ("TPU v5", "TPU v6 lite", "TPU of old")
  )
  assert attention_for(jax.devices()[0]) is plain.attention
  assert attention_for(v5p) is attention_for(v5p)
  assert attention_for(v5p) is not attention_for(v6e)
  with pytest.raises(UserError, match=r"'TPU of old'.*TPU v5 lite"):
    attention_for(unknown)


LONGEST = 127 * 1024  # The longest row whose grid has full width: its dq fills DQ_BYTES.


@pytest.mark.parametrize(
  ("topology", "tokens", "dtype"),
  [
    ("v5p:2x2x1", 300, jnp.float32),
    *(
      pytest.param(name, LONGEST, jnp.bfloat16, marks=pytest.mark.slow)
      for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
    ),
  ],
)
def test_it_compiles_for_a_tpu(monkeypatch, topology, tokens, dtype):
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5p-8")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  jax.devices()  # Reads the flags of XLA, of which libtpu does not know all those of CPUs.
  monkeypatch.setenv("XLA_FLAGS", "")
  device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
  sharding = SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct((1, tokens, 2, 64), dtype, sharding=sharding)
  ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=sharding)
  attend = attention_for(device)

  def loss(q, k, v, ids):
    return attend(q, k, v, ids).astype(jnp.float32).sum()

  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, ids).compile()
  # Forward and backward.
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
