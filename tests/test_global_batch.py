"""Global batches: which rows a process reads and which shards it gives, on simulated processes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from cogvideox_jax import sharding
from cogvideox_jax.training import global_batch

RULES = sharding.rules_named("fsdp")
ROWS, TOKENS = 8, 6


class OfProcess(Sharding):
  """A sharding as seen by a process that has only some of the devices."""

  def __init__(self, whole, devices):
    self._whole, self._devices = whole, devices

  def addressable_devices_indices_map(self, shape):
    indices = self._whole.devices_indices_map(shape)
    return {device: indices[device] for device in self._devices}


def mesh_of(order, **sizes):
  devices = np.array(jax.devices())[list(order)]
  shape = [sizes.get(axis, 1) for axis in sharding.MESH_AXES]
  return jax.sharding.Mesh(devices.reshape(shape), sharding.MESH_AXES)


def rows_of(mesh, processes):
  """Returns the rows that each of several processes reads, with equal runs of the devices."""
  rows, count = sharding.row_sharding(mesh, RULES, ROWS), len(jax.devices()) // processes
  runs = [jax.devices()[k * count : (k + 1) * count] for k in range(processes)]
  return [global_batch.rows_here(OfProcess(rows, run), ROWS) for run in runs]


IN_TURN = range(8)


@pytest.mark.parametrize(
  ("order", "sizes", "processes", "wanted"),
  [
    (IN_TURN, {"data": 8}, 2, [(0, 1, 2, 3), (4, 5, 6, 7)]),
    (IN_TURN, {"data": 2, "fsdp": 4}, 4, [(0, 1), (2, 3), (4, 5), (6, 7)]),
    # Two processes share each row, and each holds half of its shards.
    (IN_TURN, {"data": 2, "context": 4}, 4, [(0, 1, 2, 3)] * 2 + [(4, 5, 6, 7)] * 2),
    (IN_TURN, {"context": 8}, 2, [tuple(range(8))] * 2),
    (IN_TURN, {"data": 4, "tensor": 2}, 8, [(r, r + 1) for r in (0, 0, 2, 2, 4, 4, 6, 6)]),
    # A process's devices need not be consecutive along the mesh, for example on a torus.
    ((0, 4, 1, 5, 2, 6, 3, 7), {"data": 8}, 2, [(0, 2, 4, 6), (1, 3, 5, 7)]),
    ((7, 6, 5, 4, 3, 2, 1, 0), {"data": 8}, 2, [(4, 5, 6, 7), (0, 1, 2, 3)]),
  ],
)
def test_a_process_reads_the_rows_that_its_devices_hold(order, sizes, processes, wanted):
  assert rows_of(mesh_of(order, **sizes), processes) == wanted


def test_every_device_gets_its_rows_and_its_tokens_of_them():
  mesh = mesh_of((3, 1, 0, 2, 7, 5, 6, 4), data=2, fsdp=2, context=2)
  batch = {"mean": np.arange(ROWS * TOKENS * 2.0).reshape(ROWS, TOKENS, 2), "ids": np.arange(ROWS)}
  rows = ("data", "fsdp")
  shardings = {"mean": NamedSharding(mesh, P(rows, "context")), "ids": NamedSharding(mesh, P(rows))}
  placed = global_batch.assemble(batch, range(ROWS), ROWS, shardings)
  for name, array in placed.items():
    assert array.sharding == shardings[name]
    np.testing.assert_array_equal(array, batch[name])


def test_a_process_gives_only_the_rows_that_it_read(monkeypatch):
  """It has rows 1, 3, 5 and 7 of 8; no other device's shard is asked of it."""
  mesh, mine = mesh_of((0, 4, 1, 5, 2, 6, 3, 7), data=8), (1, 3, 5, 7)
  asked = {}

  def make(shape, split, shard):
    for device, index in split.devices_indices_map(shape).items():
      if device in jax.devices()[4:]:
        asked[device.id] = shard(index)[:, 0]
    return jnp.zeros(shape)

  monkeypatch.setattr(jax, "make_array_from_callback", make)
  local = np.repeat(np.array(mine)[:, None], TOKENS, axis=1)
  global_batch.assemble(
    {"mean": local}, mine, ROWS, {"mean": NamedSharding(mesh, P(("data", "fsdp")))}
  )
  assert {device: rows.tolist() for device, rows in asked.items()} == {
    4: [1],
    5: [3],
    6: [5],
    7: [7],
  }
