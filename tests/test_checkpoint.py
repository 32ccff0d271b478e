"""Checkpoints: whole, verified, and never lost to a fault."""

import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from cogvideox_jax import sharding
from cogvideox_jax.data import digests
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import checkpoint
from cogvideox_jax.training.state import Updates, abstract, create

FSDP = sharding.rules_named("fsdp")


def make_state(mesh_sizes, seed=0):
  def params(seed):
    kernel = jax.random.normal(jax.random.key(seed), (2, 16, 2048))
    return {"blocks": {"mlp": {"up": {"kernel": kernel, "bias": jnp.full((2, 2048), 0.5)}}}}

  mesh = sharding.make_mesh({"context": 1, "tensor": 1, **mesh_sizes})
  updates = Updates(optax.adamw(1e-3), ema_decay=0.9)
  return create(params, seed, updates, abstract(params(seed), updates, mesh, FSDP))


def shapes_of(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@jax.jit
def moved(state, step):
  """Returns another state, so that no two steps hold the same arrays."""
  other = jax.tree.map(lambda x: x * 1.5 if x.dtype == jnp.float32 else x, state)
  return other._replace(step=step, ema=jax.tree.map(lambda x: x + 0.25, state.params))


def save_steps(folder, steps, keep=3):
  saved = {}
  checkpoints = checkpoint.Checkpoints(folder, keep=keep, on_saved=saved.__setitem__)
  states = {}
  state = make_state({"data": 1, "fsdp": 8})
  for step in steps:
    state = states[step] = moved(state, step)
    checkpoints.save(step, state)
  checkpoints.wait()
  return checkpoints, states, saved


def files_of(path):
  return [file for file in Path(path).rglob("*") if file.is_file() and file.stat().st_size]


def flip_a_bit_of_the_arrays(path):
  """Flips a bit of an array, which Orbax restores without an error."""
  file = max(files_of(path), key=lambda file: file.stat().st_size)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(bytes(content))


def assert_same(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_a_state_comes_back_bit_for_bit_on_another_mesh(tmp_path):
  checkpoints, states, _ = save_steps(epath.Path(tmp_path), [7])
  target = shapes_of(make_state({"data": 2, "fsdp": 4}, seed=1))
  restored = checkpoints.restore(target)
  assert_same(restored.state, states[7])
  assert restored.skipped == {}
  jax.tree.map(lambda x, like: x.sharding == like.sharding or pytest.fail(), restored.state, target)


def test_the_digest_is_of_the_values_and_not_of_the_mesh(tmp_path):
  found = []
  for sizes in ({"data": 1, "fsdp": 8}, {"data": 8, "fsdp": 1}):
    folder = epath.Path(tmp_path) / str(sizes["data"])
    one = checkpoint.Checkpoints(folder, keep=1, on_saved=lambda _, digest: found.append(digest))
    one.save(1, make_state(sizes))
    one.save(2, make_state(sizes, seed=1))
    one.wait()
  assert found[:2] == found[2:]
  assert found[0] != found[1]


def test_a_saved_state_may_be_donated_at_once(tmp_path):
  checkpoints = checkpoint.Checkpoints(epath.Path(tmp_path), keep=1, on_saved=lambda *_: None)
  state = make_state({"data": 1, "fsdp": 8})
  before = jax.tree.map(np.array, state)
  shapes = shapes_of(state)
  overwrite = jax.jit(lambda x: jax.tree.map(lambda y: y * 0 - 1, x), donate_argnums=0)
  checkpoints.save(0, state)
  jax.block_until_ready(overwrite(state))
  checkpoints.wait()
  assert_same(checkpoints.restore(shapes).state, before)


def test_only_the_newest_are_kept(tmp_path):
  folder = epath.Path(tmp_path)
  _, _, saved = save_steps(folder, [1, 2, 3, 10], keep=2)
  assert checkpoint.good_steps(folder) == [3, 10]
  assert {path.name for path in folder.iterdir()} == {"3", "10"}
  assert list(saved) == [1, 2, 3, 10]
  assert digests.overall(digests.read(folder / "10")) == saved[10]


def test_a_flipped_bit_is_found_and_the_step_before_is_used(tmp_path):
  folder = epath.Path(tmp_path)
  checkpoints, states, _ = save_steps(folder, [1, 2])
  flip_a_bit_of_the_arrays(folder / "2")
  restored = checkpoints.restore(shapes_of(states[1]))
  assert_same(restored.state, states[1])
  assert "sha256 differs" in restored.skipped[2]
  assert "kernel" in restored.skipped[2]
  checkpoints.save(2, states[2])  # The step can be saved anew.
  checkpoints.wait()
  assert_same(checkpoints.restore(shapes_of(states[1])).state, states[2])


def test_damage_of_any_file_is_found_and_named(tmp_path):
  folder = epath.Path(tmp_path)
  checkpoints, states, _ = save_steps(folder, [1])
  files = files_of(folder / "1")
  for file in files:
    content = file.read_bytes()
    for damage in (content[: len(content) // 2], bytes(len(content))):
      file.write_bytes(damage)
      with pytest.raises(UserError, match=file.name):
        checkpoints.restore(shapes_of(states[1]))
      file.write_bytes(content)
  checkpoints.restore(shapes_of(states[1]))
  assert len(files) > 5


def test_a_step_without_digests_was_never_completed(tmp_path):
  folder = epath.Path(tmp_path)
  checkpoints, states, _ = save_steps(folder, [1, 2])
  (folder / "2" / "digests.json").unlink()
  restored = checkpoints.restore(shapes_of(states[1]))
  assert int(restored.state.step) == 1
  assert restored.skipped == {2: digests.INCOMPLETE}


def test_nothing_saved_is_a_new_run(tmp_path):
  checkpoints = checkpoint.Checkpoints(epath.Path(tmp_path) / "no", keep=1, on_saved=print)
  assert checkpoints.restore(shapes_of(make_state({"data": 8, "fsdp": 1}))) is None


def test_a_run_with_no_good_checkpoint_is_not_started_again_from_nothing(tmp_path):
  folder = epath.Path(tmp_path)
  checkpoints, states, _ = save_steps(folder, [1])
  flip_a_bit_of_the_arrays(folder / "1")
  with pytest.raises(UserError, match=r"step 1: .*sha256 differs"):
    checkpoints.restore(shapes_of(states[1]))
  assert checkpoint.good_steps(folder) == [1]  # Left where it was.


@pytest.mark.parametrize("weights, field", [("ema", "ema"), ("raw", "params")])
def test_weights_are_read_without_the_optimizer(tmp_path, weights, field):
  _, states, _ = save_steps(epath.Path(tmp_path) / "checkpoints", [1, 2])
  flip_a_bit_of_the_arrays(epath.Path(tmp_path) / "checkpoints" / "2")
  loaded = checkpoint.load_weights(tmp_path, weights)
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded))
  newest_good = getattr(states[1], field)
  assert jax.tree.structure(loaded) == jax.tree.structure(newest_good)


def test_a_workdir_without_checkpoints_is_named(tmp_path):
  with pytest.raises(UserError, match=str(tmp_path)):
    checkpoint.load_weights(tmp_path)


@pytest.mark.usefixtures("abandoned_writes")
def test_a_save_that_cannot_be_written_is_one_message_and_harms_no_other(tmp_path):
  folder = epath.Path(tmp_path)
  checkpoints, states, _ = save_steps(folder, [1])
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # As a full disk: writes fail.
  try:
    checkpoints.save(2, states[1])
    with pytest.raises(UserError, match=r"step 2 could not be written.*\n.*\n.*newest: step 1"):
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert checkpoint.good_steps(folder) == [1]
  assert_same(checkpoints.restore(shapes_of(states[1])).state, states[1])


def test_what_orbax_left_unfinished_is_removed_at_the_next_start_and_nothing_else(tmp_path):
  for name in ("7.orbax-checkpoint-tmp-123", "6", "notes.orbax-checkpoint-tmp", "kept"):
    (tmp_path / name).mkdir()
  (tmp_path / "8.orbax-checkpoint-tmp").symlink_to(tmp_path / "kept")
  checkpoint.Checkpoints(epath.Path(tmp_path), keep=1, on_saved=lambda *_: None)
  left = sorted(path.name for path in tmp_path.iterdir())
  assert left == ["6", "8.orbax-checkpoint-tmp", "kept", "notes.orbax-checkpoint-tmp"]
