"""Digests that several processes find together equal those of one that holds all shards."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from test_checkpoint import files_of, save_steps

from cogvideox_jax.conversion import tensors
from cogvideox_jax.data import digests
from cogvideox_jax.data.digests import UnusableError
from cogvideox_jax.training import shard_digests


@pytest.fixture
def saved(tmp_path):
  """Returns a checkpoint that one process saved, and copies of its shards."""
  _, states, _ = save_steps(epath.Path(tmp_path), [1])
  return epath.Path(tmp_path) / "1", shard_digests.copies(tensors.flatten(states[1]))


def become(monkeypatch, index, count=3):
  monkeypatch.setattr(jax, "process_index", lambda: index)
  monkeypatch.setattr(jax, "process_count", lambda: count)


def of_process(held, index, count=3):
  """Returns the shards that one of several processes holds."""
  return {path: shards[index::count] for path, shards in held.items()}


def test_shards_cover_every_array_once(saved):
  folder, held = saved
  for path, about in digests.read(folder).items():
    assert sum(shard.size for _, shard in held[path]) == np.prod(about["shape"], dtype=int)


def test_together_they_find_what_one_process_finds(saved, monkeypatch):
  folder, held = saved
  alone, names = digests.read(folder), {file.name for file in files_of(folder)}
  kept = json.loads((folder / digests.NAME).read_text())
  (folder / digests.NAME).unlink()
  for index in (2, 1, 0):
    become(monkeypatch, index)
    shard_digests.give(folder, of_process(held, index))
  digests.write(folder, *shard_digests.take(folder))
  assert json.loads((folder / digests.NAME).read_text()) == kept
  assert digests.read(folder) == alone
  assert {file.name for file in files_of(folder)} == names


def test_a_shard_that_differs_from_the_files_is_found_by_its_process(saved, monkeypatch):
  folder, held = saved
  path = next(path for path in held if path.startswith("params") and path.endswith("kernel"))
  index, shard = held[path][4]  # One of eight, which the second of three processes holds.
  odd = shard.copy()
  odd.reshape(-1).view(np.uint8)[-1] ^= 1
  held[path][4] = index, odd
  for process in (0, 2):
    become(monkeypatch, process)
    shard_digests.give(folder, of_process(held, process))
  become(monkeypatch, 1)
  with pytest.raises(UnusableError, match=f"{path} is not what was saved"):
    shard_digests.give(folder, of_process(held, 1))
  become(monkeypatch, 0)
  with pytest.raises(UnusableError, match=f"{path} is not what was saved"):
    shard_digests.take(folder)
