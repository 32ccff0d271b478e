"""The VAE's training by two real processes, as on two hosts: the same as by one."""

import signal

import pytest
from host_processes import end_all, finish, lines, start_job
from waiting import wait_until

STEPS = 12
SETTINGS = {
  "model.channels": (8, 8),
  "model.temporal_compression": 2,
  "model.latent_channels": 4,
  "model.groups": 2,
  "data.clips": 24,
  "data.sizes": ((16, 16),),
  "data.durations": (1, 5),
  "data.validation_fraction": 0.2,
  "train.steps": STEPS,
  "train.frames": 10,
  "train.batch_multiple": 2,
  "optimizer.warmup_steps": 2,
  "checkpoint.every": 4,
  "validation.every": 6,
  "preview.every": 6,
  "log_every": 1,
}


@pytest.fixture(autouse=True)
def reaped():
  yield
  end_all()


def start(workdir, count):
  """So many processes that train in one workdir, of two devices in all."""
  settings = {**SETTINGS, "cpu_devices": 2 // count}
  flags = [f"--config.{key}={value}" for key, value in settings.items()]
  return start_job(
    "train_vae", ["--config=configs/vae_tiny.py", f"--workdir={workdir}", *flags], count
  )


def metrics(workdir, *names):
  found = lines(workdir / "metrics.jsonl")
  return {(line["step"], name): line[name] for line in found for name in names if name in line}


@pytest.mark.slow
def test_two_processes_train_the_vae_as_one_stop_together_and_one_goes_on(tmp_path):
  codes, outputs = finish(start(tmp_path / "alone", 1))
  assert codes == [0], outputs
  processes = start(tmp_path / "two", 2)

  def runs() -> bool:
    assert all(process.poll() is None for process in processes), finish(processes)
    return True

  wait_until(lambda: any(step >= 5 for step, _ in metrics(tmp_path / "two", "loss")), runs=runs)
  processes[1].send_signal(signal.SIGTERM)
  codes, outputs = finish(processes)
  assert codes == [83, 83], outputs
  codes, outputs = finish(start(tmp_path / "two", 1))
  assert codes == [0] and "resumed at step" in outputs[0], outputs
  names = "loss", "grad_norm", "validation_psnr", "epoch", "frames"
  expected = metrics(tmp_path / "alone", *names)
  assert metrics(tmp_path / "two", *names) == pytest.approx(expected, rel=2e-3)
  assert (12, "validation_psnr") in expected
  for run in ("alone", "two"):
    assert (tmp_path / run / "vae" / "config.json").exists()
    assert (tmp_path / run / "previews" / "step_000012.png").exists()
