"""Steps whose numbers are wrong change no weight; what makes them wrong is found and left out."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from cogvideox_jax import sharding
from cogvideox_jax.config.safety_schema import GuardConfig
from cogvideox_jax.data.left_out import StagePlan
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import avoided, bad_steps, checkpoint, drive, guard, session
from cogvideox_jax.training import state as states
from cogvideox_jax.training.bad_steps import GoBackError
from cogvideox_jax.training.guard import Guard
from cogvideox_jax.training.metrics import Report
from cogvideox_jax.training.state import Updates

MESH = sharding.make_mesh({"data": 1, "fsdp": -1, "context": 1, "tensor": 1})
FSDP = sharding.rules_named("fsdp")
PARAMS = {
  "vae": {"mlp": {"up": {"kernel": np.ones((8, 2), np.float32)}}},
  "discriminator": {"mlp": {"up": {"kernel": np.full((8, 2), 2, np.float32)}}},
}
WATCHED = Guard({"loss": 0.0, "grad_norm": 1.0, "discriminator_grad_norm": 1.0}, spike=20.0)
UPDATES = Updates(
  {"vae": optax.adamw(1e-3), "discriminator": optax.adamw(1e-3)},
  ema_decay=0.9,
  averaged=lambda params: params["vae"],
  guard=WATCHED,
)
LIKE = states.abstract(PARAMS, UPDATES, MESH, FSDP)
CLIPS = 12
SETTINGS = GuardConfig(in_a_row=3, spike=20.0)


def create():
  return states.create(lambda params: params, PARAMS, UPDATES, LIKE)


def gradients(state, batch):
  def loss(params):
    return batch * sum(jnp.square(x).mean() for x in jax.tree.leaves(params))

  value, grads = jax.value_and_grad(loss)(state.params)
  norms = [optax.tree.norm(grads[name]) for name in ("vae", "discriminator")]
  return grads, {"loss": value, "grad_norm": norms[0], "discriminator_grad_norm": norms[1]}


@jax.jit
def take_step(state, batch):
  return UPDATES.apply_unless_bad(state, *gradients(state, batch))


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def events(workdir, name):
  return [line for line in lines(workdir / "events.jsonl") if line["event"] == name]


def same(one, other):
  leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  return all(np.array_equal(x, y) for x, y in leaves)


def moving(state):
  """What a bad step must not change."""
  return state.params, state.opt_state, state.ema


def train(workdir, last, value, stop=None, save_every=4):
  """Trains on batches of one clip each, in shuffled epochs, from wherever the workdir is.

  Args:
    value: gives the number of a batch from the clip's number and that of the batch.
    stop: the step after which the process would be killed.
  """

  def clip(batch):
    return int(np.random.default_rng(batch // CLIPS).permutation(CLIPS)[batch % CLIPS])

  def name(batch):
    return f"{clip(batch)}.mp4"

  with session.opened(workdir, keep=3, mesh=MESH, guard=SETTINGS) as opened:
    plan = opened.bad_steps.avoided.stage("")

    def taken(k):
      batch = plan.batch(k)
      left = batch
      while name(left) in plan.avoided_in(batch):
        left += 1
      return left

    report = Report(
      "test",
      last,
      ("loss",),
      log_every=1,
      way_out="Give up.",
      clips=lambda step: [name(taken(step - 1))],
      batch=lambda step: plan.batch(step - 1),
      places=lambda step: {"rows": [plan.batch(step - 1)], "files": [name(taken(step - 1))]},
    )
    while True:
      state = opened.begin(LIKE, create, steps=last)
      order = (taken(k) for k in itertools.count(int(state.step)))
      batches = (jnp.float32(value(clip(batch), batch)) for batch in order)
      try:
        return drive.take_steps(
          state, batches, take_step, opened, report, last=stop or last, save_every=save_every
        )
      except GoBackError as bad:
        opened.go_back(bad)


@pytest.fixture
def workdir(tmp_path):
  return epath.Path(tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6, 21.0])
def test_a_bad_step_changes_no_weight_no_moment_and_no_average(bad):
  state = create()
  for _ in range(guard.EARLY):
    state, _ = take_step(state, jnp.float32(1))
  after, metrics = take_step(state, jnp.float32(bad))
  assert same(moving(state), moving(after))
  assert int(after.step) == int(state.step) + 1
  assert (int(metrics[guard.IN_A_ROW]), int(metrics[guard.SKIPPED])) == (1, 1)
  assert same(after.guard.recent, state.guard.recent)
  later, metrics = take_step(after, jnp.float32(1))
  assert not same(moving(after), moving(later))
  assert (int(metrics[guard.IN_A_ROW]), int(metrics[guard.SKIPPED])) == (0, 1)
  assert int(states.updates_done(later)) == guard.EARLY + 1


@pytest.mark.parametrize("network", ["vae", "discriminator"])
def test_a_gradient_of_one_network_that_is_not_finite_stops_the_other_too(network):
  state = create()
  grads, metrics = gradients(state, jnp.float32(1))
  grads[network] = jax.tree.map(lambda x: x * jnp.nan, grads[network])
  prefix = "" if network == "vae" else "discriminator_"
  metrics[f"{prefix}grad_norm"] = optax.tree.norm(grads[network])
  after, _ = UPDATES.apply_unless_bad(state, grads, metrics)
  assert same(moving(state), moving(after))


def test_steps_that_are_good_have_the_bits_that_they_have_without_a_guard():
  bare = UPDATES._replace(guard=None)
  plain = jax.jit(lambda state, batch: bare.apply_unless_bad(state, *gradients(state, batch))[0])
  state = other = create()
  for k in range(6):
    batch = jnp.float32(1 + 0.3 * k)
    state, other = take_step(state, batch)[0], plain(other, batch)
  assert same(moving(state), moving(other))


def test_a_large_number_among_the_first_ones_does_not_hide_others():
  state = create()
  for batch in (3e7, 1.0, 1.0, 1.0, 1.0, 3e7):
    before = state
    state, _ = take_step(state, jnp.float32(batch))
  assert same(moving(before), moving(state))


def test_the_scale_follows_a_slow_rise_and_small_gradients_are_no_spikes():
  state = create()
  for batch in (*np.geomspace(1e-3, 1e-3, 8), *np.geomspace(1e-3, 10, 60)):
    metrics = {name: jnp.float32(batch) for name in WATCHED.watched}
    assert WATCHED.is_good(state.guard, metrics)
    state = state._replace(guard=WATCHED.after(state.guard, metrics, jnp.bool_(True)))
  small = {"loss": 1.0, "grad_norm": 0.9, "discriminator_grad_norm": 0.9}
  quiet = WATCHED.begin()
  for _ in range(guard.EARLY):
    seen = {**dict.fromkeys(WATCHED.watched, jnp.float32(0)), "loss": jnp.float32(1)}
    quiet = WATCHED.after(quiet, seen, jnp.bool_(True))
  assert WATCHED.is_good(quiet, {name: jnp.float32(x) for name, x in small.items()})


def test_every_skipped_step_is_named_with_its_rows_clips_and_files(workdir):
  state = train(workdir, 12, lambda clip, batch: np.nan if batch in (5, 8) else 1.0)
  found = events(workdir, "step_skipped")
  assert [event["step"] for event in found] == [6, 9]
  for event in found:
    assert event["not_finite"] == ["discriminator_grad_norm", "grad_norm", "loss"]
    assert event["rows"] == [event["step"] - 1] == [event["batch"]]
    assert event["clips"] == event["files"] and len(event["clips"]) == 1
  logged = {line["step"]: line for line in lines(workdir / "metrics.jsonl")}
  assert "loss" not in logged[6] and logged[12]["skipped_steps"] == 2
  assert guard.IN_A_ROW not in logged[12]
  assert int(state.step) == 12 and np.isfinite(state.params["vae"]["mlp"]["up"]["kernel"]).all()


def test_a_run_goes_back_after_steps_in_a_row_and_leaves_their_batches_out(workdir):
  state = train(workdir, 14, lambda clip, batch: np.nan if 5 <= batch < 8 else 1.0)
  (back,) = events(workdir, "went_back")
  assert back == {
    "event": "went_back", "step": 8, "stage": "", "back_to": 4, "batches": [5, 6, 7]
  }  # fmt: skip
  assert int(state.step) == 14
  assert int(state.guard.skipped) == 0  # The steps were taken anew, with other batches.
  left_out = {key: x for key, x in back.items() if key != "event"}
  assert lines(workdir / "avoid.jsonl") == [left_out]
  assert StagePlan([5, 6, 7], {}).batch(5) == 8
  whole = train(workdir / "whole", 14, lambda clip, batch: 1.0)
  assert same(moving(state), moving(whole))  # All good batches are the same number here.


def test_a_run_that_nothing_helps_ends_with_a_message_and_keeps_its_checkpoints(workdir):
  with pytest.raises(UserError, match=r"(?s)going back 3 times did not help.*Give up\..*spike=0"):
    train(workdir, 60, lambda clip, batch: np.nan if batch >= 10 else 1.0)
  backs = events(workdir, "went_back")
  assert [back["back_to"] for back in backs] == [8, 4, 4]
  assert backs[1]["batches"][0] == 4  # Everything since the older checkpoint.
  assert checkpoint.good_steps(workdir / "checkpoints") == [4]
  assert (workdir / "checkpoints" / "8.skipped").exists()


def test_a_clip_that_keeps_spoiling_steps_is_avoided_and_its_neighbours_are_not(
  workdir, monkeypatch
):
  monkeypatch.setattr(avoided, "DELAY", 6)
  train(workdir, 60, lambda clip, batch: 3e7 if clip == 5 else 1.0, save_every=50)
  (avoided_clip,) = lines(workdir / "avoid.jsonl")
  assert avoided_clip["clip"] == "5.mp4"
  skipped = events(workdir, "step_skipped")
  assert len(skipped) >= avoided.STRIKES
  assert all(event["batch"] < avoided_clip["from_batch"] for event in skipped)
  assert skipped[-1]["step"] < 50
  assert {"event": "clip_avoided", "stage": "", "clip": "5.mp4", "step": avoided_clip["step"]} in (
    events(workdir, "clip_avoided")
  )


def test_a_clip_that_was_bad_once_and_then_good_is_acquitted(workdir):
  bad = {5, 18, 30}
  train(workdir, 48, lambda clip, batch: np.inf if batch in bad else 1.0, save_every=40)
  assert lines(workdir / "avoid.jsonl") == []
  judged = lines(workdir / "suspects.jsonl")
  assert sum("acquitted" in line for line in judged) == sum("batch" in line for line in judged) == 3


@pytest.mark.parametrize("stop", [7, 20])
def test_a_run_with_bad_steps_that_was_stopped_makes_the_same_decisions(workdir, stop, monkeypatch):
  monkeypatch.setattr(avoided, "DELAY", 6)

  def value(clip, batch):
    return np.nan if clip == 3 or 5 <= batch < 8 else 1 + 0.01 * batch

  whole = train(workdir / "whole", 32, value)
  train(workdir / "stopped", 32, value, stop=stop)
  state = train(workdir / "stopped", 32, value)
  assert same(state, whole)
  for name in ("avoid.jsonl", "suspects.jsonl"):
    assert lines(workdir / "stopped" / name) == lines(workdir / "whole" / name)


def test_judgements_of_steps_that_are_taken_anew_do_not_count_twice(workdir):
  one = avoided.Avoided(workdir)
  one.accuse("a", 3, 2, ["x"])
  one.accuse("a", 7, 6, ["x"])
  again = avoided.Avoided(workdir)
  again.resume(5)
  assert again.suspects("a") == {"x": 1}
  assert again.accuse("a", 7, 6, ["x"]) == []
  assert again.accuse("a", 9, 8, ["x", "y"]) == ["x"]
  assert avoided.Avoided(workdir).stage("a").avoided == {"x": 8 + avoided.DELAY}
  assert not avoided.Avoided(workdir).stage("b").avoided


def test_a_damaged_list_of_avoided_clips_is_said(workdir):
  (workdir / "avoid.jsonl").write_text('{"clip": ')
  with pytest.raises(UserError, match=r"avoid\.jsonl is damaged"):
    avoided.Avoided(workdir)


def test_a_checkpoint_of_a_version_without_a_guard_is_gone_on_from(workdir):
  bare = UPDATES._replace(guard=None)
  like = states.abstract(PARAMS, bare, MESH, FSDP)
  before = states.create(lambda params: params, PARAMS, bare, like)
  with checkpoint.Checkpoints(workdir, keep=2, on_saved=lambda *_: None) as checkpoints:
    checkpoints.save(0, before)
    checkpoints.wait()
    restored = checkpoints.restore(LIKE)
  assert same(moving(restored.state), moving(before))
  assert same(restored.state.guard, WATCHED.begin())
  assert restored.state.guard.recent.sharding == LIKE.guard.recent.sharding


def test_batches_that_are_left_out_move_only_those_after_them():
  plan = StagePlan([3, 4, 7], {})
  assert [plan.batch(k) for k in range(7)] == [0, 1, 2, 5, 6, 8, 9]
  assert bad_steps.MOST_RETURNS == 3
