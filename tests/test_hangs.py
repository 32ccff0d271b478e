"""A training that hangs, or whose other processes are gone, says what it waits for and ends."""

import itertools
import json
import signal
import threading
import time

import jax.numpy as jnp
import pytest
import test_drive
from commands import Running
from etils import epath
from host_processes import end_all, finish
from small_run import make_inputs
from test_drive import LIKE, MESH, create, lines, take_step
from test_training_hosts import start, wait_for_step

from cogvideox_jax import peers
from cogvideox_jax.config.safety_schema import WatchdogConfig
from cogvideox_jax.errors import HUNG, PEER_DIED
from cogvideox_jax.training import checkpoint, drive, session
from cogvideox_jax.training.drive import Every
from cogvideox_jax.training.metrics import Report
from cogvideox_jax.training.phases import Phases


def hang(*_):
  time.sleep(600)


def train_and_hang(workdir, where):
  """Trains three steps of `test_drive`, and hangs at the third."""
  patience, report = WatchdogConfig(8.0), Report("test", 9, ("loss",), log_every=1, way_out="")

  def batches():
    for k in itertools.count(1):
      if where == "data" and k == 3:
        hang()
      yield jnp.float32(1)

  def step(state, batch):
    if where == "step" and int(state.step) == 2:
      hang()
    return take_step(state, batch)

  if where == "save":
    checkpoint.Checkpoints.save = hang
  happenings = [Every(3, hang)] if where == "validate" else []
  with session.opened(workdir, keep=2, mesh=MESH, watchdog=patience) as opened:
    state = opened.begin(LIKE, create, steps=9, frozen=test_drive.FROZEN)
    drive.take_steps(
      state, batches(), step, opened, report, last=9, save_every=3, happenings=happenings
    )


@pytest.mark.parametrize(
  ("where", "said"),
  [
    ("data", "It waits for data"),
    ("step", "It waits for the device"),
    ("save", "It waits for a save"),
    ("validate", "It waits for validation or previews"),
  ],
)
def test_what_hangs_is_named_with_its_stack_and_the_process_ends_with_85(tmp_path, where, said):
  workdir = epath.Path(tmp_path / "run")
  ended = Running(tmp_path, train_and_hang, workdir, where).wait()
  assert ended.code == HUNG == 85
  assert f"Step 3 has made no progress for 8 s.\n{said}" in ended.errors
  assert "in hang" in ended.errors and "config.watchdog.seconds" in ended.errors
  (event,) = [line for line in lines(workdir / "events.jsonl") if line["event"] == "hung"]
  assert (event["step"], event["waits_for"]) == (3, where)


def test_a_training_that_goes_on_is_left_alone_however_long_it_takes_in_all():
  left = []
  with Phases(0.4, leave=left.append) as phases:
    for step in range(8):
      phases.enter("data", step)
      time.sleep(0.05)
      phases.enter("step", step)
      time.sleep(0.05)
  time.sleep(0.5)
  assert not left
  assert phases.seconds["data"] == pytest.approx(0.4, abs=0.3)


class Store:
  """The keys and values of JAX's coordinator, without the coordinator."""

  def __init__(self):
    self.values, self.answers = {}, threading.Event()
    self.answers.set()

  def key_value_set(self, key, value, allow_overwrite):
    self.answers.wait()
    self.values[key] = value

  def key_value_dir_get(self, folder):
    self.answers.wait()
    return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


def watch(store, index, left):
  one = peers.Peers(store, index, 2, leave=left.append, interval=0.05, silence=0.5)
  one.start()
  return one


def wait_for(condition):
  deadline = time.monotonic() + 10
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.02)
  return condition()


def test_a_silent_process_is_named_with_what_it_did_and_one_that_ended_is_not(capfd):
  store, left = Store(), []
  first, second = watch(store, 0, left), watch(store, 1, [])
  second.doing = "in step 7 (data)"
  assert wait_for(lambda: "in step 7 (data)" in "".join(first.others()))
  second._ended.set()  # Its threads stop without a word, as when it is killed.
  assert wait_for(lambda: left == [PEER_DIED])
  said = capfd.readouterr().err
  assert "in step 7 (data): no sign of life for 0.5 s." in said and "Process 1 on " in said
  assert len(said.splitlines()) <= 4

  store, left = Store(), []
  first, second = watch(store, 0, left), watch(store, 1, [])
  second.end()
  time.sleep(1)
  assert not left
  first.end()


def test_a_coordinator_that_does_not_answer_is_named(capfd):
  store, left = Store(), []
  watch(store, 1, left)
  store.values[f"{peers.FOLDER}0"] = json.dumps(peers.Sign(1, "x", "")._asdict())
  store.answers.clear()
  assert wait_for(lambda: left == [PEER_DIED])
  assert "The coordinator of this job, in process 0, has not answered" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_ends_the_other_with_84_and_a_few_lines(tmp_path, stopped):
  inputs, workdir = make_inputs(epath.Path(tmp_path)), tmp_path / "run"
  try:
    processes = start(inputs, workdir, 2)
    wait_for_step(workdir, 5, processes)
    processes[stopped].send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    other = processes[1 - stopped]
    ended = other.wait()
    assert ended.code == PEER_DIED, ended.errors
    assert time.monotonic() - begun < peers.SILENCE + 25
    words = "has not answered" if stopped == 0 else "no sign of life"
    assert words in ended.errors
    assert "goes on from what was saved last" in ended.errors
  finally:
    end_all()
  codes, outputs = finish(start(inputs, workdir, 1))
  assert codes == [0], outputs
