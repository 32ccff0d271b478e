"""What a process reads of a global batch, and gives of it, where processes are made up."""

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
  """A sharding as a process sees it that has only some of the devices."""

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
  """Of processes that have equal runs of the machine's devices."""
  rows, count = sharding.row_sharding(mesh, RULES, ROWS), len(jax.devices()) // processes
  runs = [jax.devices()[k * count : (k + 1) * count] for k in range(processes)]
  return [global_batch.rows_here(OfProcess(rows, run), ROWS) for run in runs]


IN_TURN = range(8)


@pytest.mark.parametrize(
  ("order", "sizes", "processes", "wanted"),
  [
    (IN_TURN, {"data": 8}, 2, [(0, 1, 2, 3), (4, 5, 6, 7)]),
    (IN_TURN, {"data": 2, "fsdp": 4}, 4, [(0, 1), (2, 3), (4, 5), (6, 7)]),
    # Two processes share each row, of which they hold parts.
    (IN_TURN, {"data": 2, "context": 4}, 4, [(0, 1, 2, 3)] * 2 + [(4, 5, 6, 7)] * 2),
    (IN_TURN, {"context": 8}, 2, [tuple(range(8))] * 2),
    (IN_TURN, {"data": 4, "tensor": 2}, 8, [(r, r + 1) for r in (0, 0, 2, 2, 4, 4, 6, 6)]),
    # As on a torus: a process's devices are not in turn along the mesh.
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
  places = {"mean": NamedSharding(mesh, P(rows, "context")), "ids": NamedSharding(mesh, P(rows))}
  placed = global_batch.place(batch, range(ROWS), ROWS, places)
  for name, array in placed.items():
    assert array.sharding == places[name]
    np.testing.assert_array_equal(array, batch[name])


def test_a_process_gives_only_the_rows_that_it_read(monkeypatch):
  """Of 8 rows it has 1, 3, 5 and 7: the others' devices are never asked for here."""
  mesh, mine = mesh_of((0, 4, 1, 5, 2, 6, 3, 7), data=8), (1, 3, 5, 7)
  asked = {}

  def make(shape, place, part):
    for device, index in place.devices_indices_map(shape).items():
      if device in jax.devices()[4:]:
        asked[device.id] = part(index)[:, 0]
    return jnp.zeros(shape)

  monkeypatch.setattr(jax, "make_array_from_callback", make)
  local = np.repeat(np.array(mine)[:, None], TOKENS, axis=1)
  global_batch.place(
    {"mean": local}, mine, ROWS, {"mean": NamedSharding(mesh, P(("data", "fsdp")))}
  )
  assert {device: rows.tolist() for device, rows in asked.items()} == {
    4: [1],
    5: [3],
    6: [5],
    7: [7],
  }
