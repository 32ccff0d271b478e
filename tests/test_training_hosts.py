"""Training by two real processes, as on two hosts: what one does, whoever must stop or dies."""

import signal

import pytest
from commands import Running
from host_processes import end_all, finish, lines, start_job
from small_run import config_flags_of, make_inputs, settings
from waiting import wait_until

STEPS = 40


@pytest.fixture(autouse=True)
def reaped():
  """No process outlives its test, which may fail while one waits for another."""
  yield
  end_all()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  return make_inputs(tmp_path_factory.mktemp("inputs"))


def start(inputs, workdir, count, **changes) -> list[Running]:
  """So many processes that train in one workdir, of two devices in all."""
  values = settings(
    inputs,
    train__steps=STEPS,
    cpu_devices=2 // count,
    checkpoint__every=4 if count > 1 else STEPS // 2,
    validation__every=0,
    **changes,
  )
  flags = ["--config=configs/tiny.py", f"--workdir={workdir}", *config_flags_of(values)]
  return start_job("train", flags, count)


def losses(workdir) -> dict[int, float]:
  return {line["step"]: line["loss"] for line in lines(workdir / "metrics.jsonl")}


def wait_for_step(workdir, step, processes) -> None:
  def runs() -> bool:
    assert all(process.poll() is None for process in processes), finish(processes)
    return True

  wait_until(lambda: max(losses(workdir), default=0) >= step, runs=runs)


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
  """The workdir of one process with both devices."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  codes, outputs = finish(start(inputs, workdir, 1))
  assert codes == [0], outputs
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh",
  [
    pytest.param({}, id="rows"),
    pytest.param({"mesh__data": 1, "mesh__context": 2}, id="tokens"),
  ],
)
def test_two_processes_train_as_one_stop_together_and_one_goes_on(inputs, alone, tmp_path, mesh):
  workdir = tmp_path / "run"
  processes = start(inputs, workdir, 2, **mesh)
  wait_for_step(workdir, 5, processes)
  processes[1].send_signal(signal.SIGTERM)
  codes, outputs = finish(processes)
  assert codes == [83, 83], outputs
  saved = [line for line in lines(workdir / "events.jsonl") if line["event"] == "checkpoint_saved"]
  stopped = saved[-1]["step"]
  assert 5 <= stopped < STEPS and len(saved) == len({line["step"] for line in saved})
  assert f"Stopped at step {stopped}" in outputs[0] and not outputs[1].count("Stopped")
  expected = losses(alone)
  assert losses(workdir) == pytest.approx({k: expected[k] for k in range(1, stopped + 1)}, rel=1e-5)

  codes, outputs = finish(start(inputs, workdir, 1))
  assert codes == [0] and f"resumed at step {stopped} of {STEPS}" in outputs[0], outputs
  assert losses(workdir) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_both_go_on_from_what_was_saved(
  inputs, alone, tmp_path
):
  workdir = tmp_path / "run"
  processes = start(inputs, workdir, 2)
  wait_for_step(workdir, 9, processes)
  processes[1].send_signal(signal.SIGKILL)
  codes, outputs = finish(processes)
  assert codes[0] in (84, -signal.SIGABRT), outputs  # The latter where JAX sees it first.
  codes, outputs = finish(start(inputs, workdir, 2))
  assert codes == [0, 0] and "resumed at step" in outputs[0], outputs
  assert "resumed at step 0" not in outputs[0]
  assert losses(workdir) == pytest.approx(losses(alone), rel=1e-4)


def test_a_mistake_that_one_process_sees_ends_both(inputs, tmp_path):
  processes = start(inputs, tmp_path / "run", 2, stages__tiny__rows=7)
  codes, outputs = finish(processes)
  assert codes == [2, 2], outputs
