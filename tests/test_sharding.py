"""Where arrays are placed, and what the tables refuse."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from cogvideox_jax import sharding
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import state

SIZES = {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
FSDP = sharding.rules_named("fsdp")


def params(seed=0):
  up = jax.random.normal(jax.random.key(seed), (3, 8, 16))
  return {"blocks": {"mlp": {"up": {"kernel": up, "bias": jnp.ones((3, 16))}}}}


def make_state(mesh):
  tx = optax.adamw(1e-3)
  return state.create(params, 0, tx, state.abstract(params(), tx, mesh, FSDP))


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


def test_optimizer_state_and_average_are_placed_as_their_parameters():
  mesh = sharding.make_mesh(SIZES)
  made = make_state(mesh)
  kernels = [
    leaf for path, leaf in jax.tree.leaves_with_path(made) if "kernel" in sharding.path_name(path)
  ]
  assert len(kernels) == 4  # Weights, average, two moments.
  for kernel in kernels:
    assert kernel.sharding.spec == P(None, "fsdp", None)
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
    ("blocks/attention/query/kernel", (3, 8, 2, 4), P(None, "fsdp", "tensor", None)),
    ("blocks/attention/out/kernel", (3, 2, 4, 8), P(None, "tensor", None, "fsdp")),
    ("out/kernel", (8, 12), P("fsdp", None)),
    ("ema/out_modulation/kernel", (8, 6), P("fsdp", None)),
    ("opt_state/1/0/nu/blocks/mlp/down/kernel", (3, 16, 8), P(None, "tensor", "fsdp")),
    ("blocks/attention/query/bias", (3, 2, 4), P(None, None, None)),
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


def test_an_unknown_layout_is_refused_with_those_there_are():
  with pytest.raises(UserError, match=r"'fdsp'.*fsdp, fsdp_tensor"):
    sharding.rules_named("fdsp")


@pytest.mark.parametrize(
  ("flags", "devices"), [("", 3), ("--xla_force_host_platform_device_count=2", 2)]
)
def test_a_cpu_counts_as_several_devices_unless_the_environment_says_how_many(flags, devices):
  use = "from cogvideox_jax import sharding; sharding.split_cpu(3)"
  code = f"import jax; {use}; print(len(jax.devices()))"
  environment = os.environ | {"XLA_FLAGS": flags}
  result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
  assert int(result.stdout) == devices, result.stderr
