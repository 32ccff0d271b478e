"""The driver of steps, on a training of two numbers: what it does, whatever it trains."""

import itertools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from cogvideox_jax import sharding
from cogvideox_jax.errors import UserError
from cogvideox_jax.exclusive import exclusive
from cogvideox_jax.training import checkpoint, drive, session
from cogvideox_jax.training import state as states
from cogvideox_jax.training.drive import Every
from cogvideox_jax.training.metrics import Report
from cogvideox_jax.training.state import Updates

MESH = sharding.make_mesh({"data": 1, "fsdp": -1, "context": 1, "tensor": 1})
FSDP = sharding.rules_named("fsdp")
PARAMS = {
  "generator": {"mlp": {"up": {"kernel": np.ones((8, 2), np.float32)}}},
  "discriminator": {"mlp": {"up": {"kernel": np.full((8, 2), 2, np.float32)}}},
}
FROZEN = {"mlp": {"up": {"kernel": np.full((8, 2), 3, np.float32)}}}
UPDATES = Updates(
  {"generator": optax.adamw(1e-2), "discriminator": optax.sgd(1e-1)},
  ema_decay=0.9,
  averaged=lambda params: params["generator"],
)
LIKE = states.abstract(PARAMS, UPDATES, MESH, FSDP, FROZEN)


def create():
  return states.create(lambda params: params, PARAMS, UPDATES, LIKE, FROZEN)


@jax.jit
def gradients(state, batch):
  def loss(params):
    scale = batch * state.frozen["mlp"]["up"]["kernel"].mean()
    return scale * sum(jnp.square(x).sum() for x in jax.tree.leaves(params))

  return jax.value_and_grad(loss)(state.params)


def take_step(state, batch):
  loss, grads = gradients(state, batch)
  if int(state.step) % 2:  # The discriminator moves in every other step.
    del grads["discriminator"]
  return UPDATES.apply(state, grads), {"loss": loss}


def run(workdir, last, batches=None, take_step=take_step, **named):
  """One start of the training; the state after its last step, and the exit code."""
  report = Report("test", last, ("loss",), log_every=1, way_out="Give up.")
  with session.opened(workdir, keep=2, mesh=MESH) as opened:
    state = opened.begin(LIKE, create, steps=last, frozen=FROZEN)
    batches = itertools.repeat(jnp.float32(1)) if batches is None else batches
    named = {"save_every": 2, **named}
    state = drive.take_steps(state, batches, take_step, opened, report, last=last, **named)
    return state, opened.end(int(state.step), steps=last)


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def saved(workdir):
  events = lines(workdir / "events.jsonl")
  return {e["step"]: e["digest"] for e in events if e["event"] == "checkpoint_saved"}


@pytest.fixture
def workdir(tmp_path):
  return epath.Path(tmp_path)


def test_all_optimizers_go_on_after_a_stop_and_what_is_frozen_is_not_saved(workdir):
  run(workdir / "whole", 6)
  run(workdir / "stopped", 3)
  state, code = run(workdir / "stopped", 6)
  assert code == 0 and int(state.step) == 6
  assert saved(workdir / "stopped")[6] == saved(workdir / "whole")[6]
  names = json.loads((workdir / "whole" / "checkpoints" / "6" / "digests.json").read_text())
  stored = set(names["arrays"])
  assert {name.split("/")[0] for name in stored} == {"step", "params", "opt_state", "ema"}
  assert {name.split("/")[1] for name in stored if name.startswith("opt_state/gen")} == {
    "generator"
  }
  np.testing.assert_array_equal(state.frozen["mlp"]["up"]["kernel"], 3)
  assert state.frozen["mlp"]["up"]["kernel"].sharding == LIKE.frozen["mlp"]["up"]["kernel"].sharding


def test_an_optimizer_without_gradients_leaves_its_parameters_and_moments():
  first = UPDATES.apply(create(), {"generator": PARAMS["generator"]})
  jax.tree.map(
    np.testing.assert_array_equal, first.params["discriminator"], PARAMS["discriminator"]
  )
  moved = first.params["generator"]["mlp"]["up"]["kernel"]
  assert np.all(np.asarray(moved) < 1)
  assert int(first.opt_state["generator"][0].count) == 1
  # The average is of the generator alone, and has moved toward it.
  assert jax.tree.structure(first.ema) == jax.tree.structure(PARAMS["generator"])
  np.testing.assert_allclose(first.ema["mlp"]["up"]["kernel"], 0.1 + 0.9 * moved, rtol=1e-6)


def test_a_compiled_step_may_take_the_buffers_of_all_the_state_frozen_parameters_too():
  shardings = states.shardings_of(LIKE)

  def step(state, batch):
    return UPDATES.apply(state, gradients(state, batch)[1]), batch

  compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
  state = create()
  for _ in range(3):
    state, _ = jax.block_until_ready(compiled(state, jnp.float32(1)))
  np.testing.assert_array_equal(state.frozen["mlp"]["up"]["kernel"], 3)
  assert int(state.step) == 3


def test_what_measures_comes_before_a_save_and_the_rest_after_it(workdir, monkeypatch):
  order = []
  save = checkpoint.Checkpoints.save

  def note_save(self, step, state):
    order.append(("save", step))
    save(self, step, state)

  monkeypatch.setattr(checkpoint.Checkpoints, "save", note_save)

  def happening(name, numbers):
    def do(step, state):
      assert int(state.step) == step
      order.append((name, step))
      return numbers

    return do

  happenings = [
    Every(2, happening("preview", None)),
    Every(2, happening("validate", {"validation_loss": 1.0}), measures=True),
    Every(3, happening("evaluate", {"score": 2.0}), measures=True),
    Every(0, happening("never", None)),
  ]
  run(workdir, 6, happenings=happenings)
  assert order == [
    *(("validate", 2), ("save", 2), ("preview", 2), ("evaluate", 3)),
    *(("validate", 4), ("save", 4), ("preview", 4)),
    *(("validate", 6), ("evaluate", 6), ("save", 6), ("preview", 6)),
  ]
  logged = {line["step"]: line for line in lines(workdir / "metrics.jsonl")}
  assert ["validation_loss" in logged[step] for step in range(1, 7)] == [False, True] * 3
  assert ["score" in logged[step] for step in range(1, 7)] == [False, False, True] * 2


@pytest.mark.parametrize("waits", [True, False])
def test_nothing_that_is_not_finite_is_saved_however_late_metrics_are_read(
  workdir, monkeypatch, waits
):
  opened = session.opened

  def open_and_wait(*args, **named):
    with opened(*args, **named) as one:
      yield one._replace(waits=waits)

  monkeypatch.setattr(session, "opened", session.contextmanager(open_and_wait))
  batches = (jnp.float32(np.nan if k == 5 else 1) for k in itertools.count(1))
  with pytest.raises(UserError, match=r"at step 5: loss not finite(.|\n)*Give up\."):
    run(workdir, 9, batches, save_every=1)
  assert checkpoint.good_steps(workdir / "checkpoints") == [3, 4]
  assert {"event": "not_finite", "step": 5, "metrics": ["loss"]} in lines(workdir / "events.jsonl")


def test_a_signal_stops_after_the_step_under_way_and_saves_it(workdir):
  def step_and_signal(state, batch):
    if int(state.step) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return take_step(state, batch)

  state, code = run(workdir, 9, take_step=step_and_signal)
  assert (int(state.step), code) == (3, 83)
  assert checkpoint.good_steps(workdir / "checkpoints") == [2, 3]


def test_a_save_that_failed_stops_the_training_at_the_next_step(workdir, monkeypatch):
  def fail(self):
    raise UserError("no room")

  monkeypatch.setattr(checkpoint.Checkpoints, "check", fail)
  with pytest.raises(UserError, match="no room"):
    run(workdir, 9)


def test_batches_are_put_on_the_mesh_ahead_of_their_steps_and_none_is_lost():
  done = []

  def put(k):
    done.append(k)
    return 10 * k

  ahead = drive.read_ahead(iter(range(9)), put)
  assert next(ahead) == 0 and done == [0, 1, 2]
  assert [next(ahead) for _ in range(3)] == [10, 20, 30] and done == [0, 1, 2, 3, 4, 5]
  assert [*ahead] == [40, 50, 60, 70, 80]


def remove(workdir, checkpoints):
  checkpoints.wait()  # A folder that a save still writes to cannot be removed for good.
  workdir.rmtree()


def rename_during_a_save(workdir, checkpoints):
  workdir.rename(workdir.with_name("renamed"))


@pytest.mark.usefixtures("abandoned_writes")
@pytest.mark.parametrize("take_away", [remove, rename_during_a_save])
@pytest.mark.parametrize("log_every, save_every", [(1, 5), (100, 1)])
def test_a_workdir_that_is_taken_away_ends_the_run_with_one_message(
  workdir, take_away, log_every, save_every
):
  """Whether a line of the log or a checkpoint comes next."""
  workdir /= "workdir"

  def step_and_take_away(state, batch):
    if int(state.step) == 1:
      take_away(workdir, one.checkpoints)
    return take_step(state, batch)

  with exclusive(workdir) as check_lock:
    report = Report("test", 4, ("loss",), log_every=log_every, way_out="Give up.")
    with pytest.raises(UserError, match=r"was removed or renamed while this run wrote to it"):  # noqa: SIM117
      with session.opened(workdir, keep=2, mesh=MESH, check_lock=check_lock) as one:
        state = one.begin(LIKE, create, steps=4, frozen=FROZEN)
        batches = (jnp.float32(k) for k in itertools.count(1))
        drive.take_steps(
          state, batches, step_and_take_away, one, report, last=4, save_every=save_every
        )
