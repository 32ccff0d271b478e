"""Shardings of parameters, states and batches, and what the tables refuse."""

import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from cogvideox_jax import sharding
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import state
from cogvideox_jax.types import Batch

SIZES = {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
FSDP = sharding.rules_named("fsdp")
SHARDED = ("fsdp", "context")


def params(seed=0):
  up = jax.random.normal(jax.random.key(seed), (3, 8, 16))
  return {"blocks": {"mlp": {"up": {"kernel": up, "bias": jnp.ones((3, 16))}}}}


def make_state(mesh):
  updates = state.Updates(optax.adamw(1e-3), ema_decay=0.9)
  return state.create(params, 0, updates, state.abstract(params(), updates, mesh, FSDP))


def test_one_size_of_the_mesh_may_be_left_open():
  mesh = sharding.make_mesh({**SIZES, "data": -1})
  assert dict(mesh.shape) == SIZES


@pytest.mark.parametrize(
  "change",
  [{"data": 3}, {"data": 0}, {"data": -1, "fsdp": -1}, {"fsdp": -2}, {"data": -1, "fsdp": 3}],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(change):
  with pytest.raises(UserError, match="8 devices"):
    sharding.make_mesh({**SIZES, **change})


def test_optimizer_state_and_average_are_sharded_as_their_parameters():
  mesh = sharding.make_mesh(SIZES)
  made = make_state(mesh)
  kernels = [
    leaf for path, leaf in jax.tree.leaves_with_path(made) if "kernel" in sharding.path_name(path)
  ]
  assert len(kernels) == 4  # Weights, average, two moments.
  for kernel in kernels:
    assert kernel.sharding.spec == P(None, ("fsdp", "context"), None)
    assert kernel.addressable_shards[0].data.shape == (3, 2, 16)


def test_the_average_has_its_own_buffers():
  mesh = sharding.make_mesh({**SIZES, "data": 8, "fsdp": 1})
  made = make_state(mesh)

  def pointers(tree):
    return {
      shard.data.unsafe_buffer_pointer()
      for leaf in jax.tree.leaves(tree)
      for shard in leaf.addressable_shards
    }

  assert not pointers(made.params) & pointers(made.ema)


@pytest.mark.parametrize(
  "name, shape, spec",
  [
    ("blocks/attention/query/kernel", (3, 8, 8), P(None, SHARDED, "tensor")),
    ("blocks/attention/out/kernel", (3, 8, 8), P(None, "tensor", SHARDED)),
    ("out/kernel", (8, 12), P(SHARDED, None)),
    ("ema/out_modulation/kernel", (8, 6), P(SHARDED, None)),
    ("opt_state/1/0/nu/blocks/mlp/down/kernel", (3, 16, 8), P(None, "tensor", SHARDED)),
    ("blocks/attention/query/bias", (3, 8), P(None, None)),
    ("opt_state/1/0/count", (), P()),
  ],
)
def test_the_end_of_a_path_decides(name, shape, spec):
  mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "context": 1, "tensor": 2})
  tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32)}
  assert sharding.shardings(tree, mesh, sharding.rules_named("fsdp_tensor"))[name].spec == spec


def test_a_path_that_matches_no_row_or_two_raises_with_its_name(monkeypatch):
  mesh = sharding.make_mesh(SIZES)
  with pytest.raises(ValueError, match="blocks/new/weights must match one row"):
    sharding.shardings({"blocks": {"new": {"weights": jnp.ones(8)}}}, mesh, FSDP)
  monkeypatch.setitem(sharding.PARAM_AXES, "up/kernel", ("embed", "mlp"))
  with pytest.raises(ValueError, match=r"mlp/up/kernel must match one row .* not 2"):
    sharding.shardings(params(), mesh, FSDP)


def test_an_array_of_unexpected_rank_raises_with_its_name():
  mesh = sharding.make_mesh(SIZES)
  with pytest.raises(ValueError, match="mlp/up/kernel has 4 axes"):
    sharding.shardings({"mlp": {"up": {"kernel": jnp.ones((1, 1, 8, 8))}}}, mesh, FSDP)


def test_sizes_that_do_not_divide_are_the_users_to_mend():
  mesh = sharding.make_mesh(SIZES)
  with pytest.raises(UserError, match="6 is not a multiple of 4"):
    sharding.shardings({"mlp": {"up": {"kernel": jnp.ones((6, 8))}}}, mesh, FSDP)
  with pytest.raises(UserError, match="multiple of 8"):
    sharding.row_sharding(mesh, FSDP, rows=12)


@pytest.mark.parametrize(
  ("sizes", "most", "context"),
  [
    ({"fsdp": -1}, 4, 4),
    ({"fsdp": -1}, 3, 2),  # 8 devices do not divide by 3.
    ({"fsdp": -1}, 100, 8),
    ({"data": 2, "fsdp": -1}, 8, 4),
    ({"data": 2, "fsdp": 2}, 8, 2),
    ({"fsdp": -1, "context": 2}, 8, 2),  # A size that the mesh sets is kept.
  ],
)
def test_as_many_devices_share_a_row_as_a_stage_says_and_the_mesh_allows(sizes, most, context):
  sizes = {"data": 1, "fsdp": 1, "context": 0, "tensor": 1, **sizes}
  mesh = sharding.make_mesh(sharding.with_context(sizes, most, jax.devices()))
  assert mesh.shape["context"] == context
  assert mesh.size == 8
  one = sharding.with_context({**sizes, "data": 1, "fsdp": -1}, most, jax.devices()[:1])
  assert one["context"] in (1, sizes["context"])


class FakeDevice(SimpleNamespace):
  __hash__ = object.__hash__
  __eq__ = object.__eq__


def test_data_spans_the_slices_and_the_other_axes_stay_in_one():
  devices = [
    FakeDevice(
      id=number,
      process_index=number // 4,
      slice_index=number // 4,
      platform="cpu",
      device_kind="cpu",
      client=None,
    )
    for number in range(8)
  ]
  sizes = sharding.with_context({**SIZES, "data": 1, "fsdp": -1, "context": 0}, 2, devices)
  mesh = sharding.make_mesh(sizes, devices)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 2, "tensor": 1}
  of_slices = [{device.slice_index for device in part.flat} for part in mesh.devices]
  assert of_slices == [{0}, {1}]
  with pytest.raises(UserError, match="4 devices"):
    sharding.make_mesh({**SIZES, "data": 2, "fsdp": 4}, devices)


def make_batch(rows, tokens):
  number = np.arange(rows, dtype=np.int32)
  numbers = np.broadcast_to(number[:, None], (rows, tokens))
  wide = np.broadcast_to(number[:, None, None], (rows, tokens, 3))
  few = np.zeros((rows, 2, 3), np.int32)
  return Batch(wide, wide, few[:, 1:, None], numbers, numbers, wide, few)


def test_a_microbatch_takes_rows_that_its_devices_hold():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "context": 2, "tensor": 1})
  batch = make_batch(rows=16, tokens=6)
  batch = jax.device_put(batch, sharding.batch_shardings(batch, mesh, FSDP))
  split = jax.jit(partial(sharding.split_rows, microbatches=2, mesh=mesh, rules=FSDP))
  microbatches = jax.block_until_ready(split(batch))
  assert microbatches.mean.shape == (2, 8, 6, 3)
  assert microbatches.segment_ids[:, :, 0].tolist() == [
    [0, 1, 4, 5, 8, 9, 12, 13],
    [2, 3, 6, 7, 10, 11, 14, 15],
  ]
  assert "all-" not in split.lower(batch).compile().as_text()  # Nothing was sent.
  held = {shard.device: shard.data for shard in microbatches.mean.addressable_shards}
  for shard in batch.mean.addressable_shards:
    np.testing.assert_array_equal(np.concatenate(held[shard.device]), shard.data)
    assert shard.data.shape == (4, 3, 3)  # The other device of the row has the other tokens.


def test_a_batch_that_does_not_divide_is_refused_with_what_to_change():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "context": 4, "tensor": 1})
  with pytest.raises(UserError, match="3 rows does not divide over data x fsdp"):
    sharding.batch_shardings(make_batch(3, 8), mesh, FSDP)
  with pytest.raises(UserError, match="10 tokens does not divide over context"):
    sharding.batch_shardings(make_batch(2, 10), mesh, FSDP)


def test_an_unknown_layout_is_refused_with_those_there_are():
  with pytest.raises(UserError, match=r"'fdsp'.*fsdp, fsdp_tensor"):
    sharding.rules_named("fdsp")


@pytest.mark.parametrize(
  ("flags", "devices"), [("", 3), ("--xla_force_host_platform_device_count=2", 2)]
)
def test_a_cpu_counts_as_several_devices_unless_the_environment_says_how_many(flags, devices):
  use = "from cogvideox_jax import sharding; sharding.split_cpu(3)"
  code = f"import glob, jax; {use}; print(len(jax.devices()), THREADS)"
  threads = (
    """sum("XLAEigen" in open(name).read() for name in glob.glob("/proc/self/task/*/comm"))"""
  )
  environment = os.environ | {"XLA_FLAGS": flags}
  result = subprocess.run(
    [sys.executable, "-c", code.replace("THREADS", threads)], env=environment, capture_output=True
  )
  found, in_pool = map(int, result.stdout.split())
  assert found == devices, result.stderr
  # So that devices which wait for another one leave a thread for it, on a machine of few cores.
  assert in_pool >= 4 * devices
