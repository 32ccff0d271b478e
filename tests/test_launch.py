"""The launch scripts, against a fake cloud that takes the machines away three times."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
FAKE = ROOT / "tests" / "fake_cloud.sh"
TOOLS = ("gcloud", "xpk", "sky", "docker", "kubectl", "sudo", "curl", "hostname", "sleep")
SCRIPTS = ("tpu_vm.sh", "queued_resource.sh", "xpk.sh", "sky.sh")
VERBS = ("create", "run", "logs", "status", "resume", "watch", "delete")
CANARY = "canary-0123456789"


class Cloud:
  """A fake cloud in a folder, and a job for it."""

  def __init__(self, folder: Path, **job: str):
    self.folder = folder
    for name in ("bin", "machines", "bucket"):
      (folder / name).mkdir()
    for tool in TOOLS:
      self.put(tool)
    (folder / "calls").touch()
    self.job = folder / "job.env"
    lines = (LAUNCH / "example.env").read_text().splitlines()
    values = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    self.job.write_text("\n".join(f"{key}={value}" for key, value in {**values, **job}.items()))

  def put(self, tool: str) -> None:
    """Puts the fake in front of a program. A copy, because a file that cannot run would not be."""
    shutil.copy(FAKE, self.folder / "bin" / tool)
    (self.folder / "bin" / tool).chmod(0o755)

  def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
      ["bash", str(LAUNCH / script), *arguments],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=ROOT,
      env={
        "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
        "FAKE": str(self.folder),
        "HOME": str(self.folder),
        "LAUNCH_POLL": "0.02",
        "LAUNCH_LOG": str(self.folder / "log"),
        "BACKOFF": "1",
        "GONE": "PREEMPTED",
        "SLEEP": str(shutil.which("sleep")),
        "HF_TOKEN": CANARY,
        "API_KEY": CANARY,
        **environment,
      },
    )

  def run(self, script: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Runs a script to its end; returns its exit code and all that it printed."""
    process = self.start(script, *arguments, **environment)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output + errors

  def with_python(self) -> None:
    """Takes the place of Python, for jobs that run outside of a container of Docker."""
    self.put("python")

  @property
  def calls(self) -> list[str]:
    return (self.folder / "calls").read_text().splitlines()

  @property
  def runs(self) -> int:
    """How many trainings have begun."""
    file = self.folder / "runs"
    return int(file.read_text()) if file.exists() else 0

  @property
  def left(self) -> list[str]:
    """The machines, clusters and workloads that are left."""
    return sorted(path.name for path in (self.folder / "machines").iterdir())

  def texts(self) -> str:
    """All that anyone has written."""
    return "\n".join(path.read_text() for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture
def cloud(tmp_path):
  return Cloud(tmp_path)


@pytest.mark.parametrize(
  ("script", "gone"), [("tpu_vm.sh", "PREEMPTED"), ("queued_resource.sh", "SUSPENDED")]
)
def test_a_job_on_machines_ends_after_three_preemptions_and_nothing_is_left(cloud, script, gone):
  code, printed = cloud.run(script, "run", str(cloud.job))
  assert code == 0, printed
  code, printed = cloud.run(script, "watch", str(cloud.job), PREEMPTIONS="3", GONE=gone)
  assert code == 0, printed
  assert cloud.runs == 4 and cloud.left == []
  creations = [call for call in cloud.calls if " create " in call]
  assert len(creations) == 4 and all("--spot" in call for call in creations)
  trainings = [call for call in cloud.calls if "cogvideox_jax.train" in call]
  assert len(set(trainings)) == 1 and "--config=5b" in trainings[0]
  assert CANARY not in printed + cloud.texts()


def test_a_job_through_xpk_ends_after_three_preemptions_and_nothing_is_left(cloud):
  cloud.with_python()
  for verb in ("create", "run"):
    assert cloud.run("xpk.sh", verb, str(cloud.job))[0] == 0
  code, printed = cloud.run("xpk.sh", "watch", str(cloud.job), PREEMPTIONS="3")
  assert code == 0, printed
  assert cloud.runs == 4 and cloud.left == []
  assert CANARY not in printed + cloud.texts()


def test_a_cluster_of_others_stays(tmp_path):
  cloud = Cloud(tmp_path, CLUSTER="ours")
  cloud.with_python()
  for verb in ("create", "run", "watch"):
    assert cloud.run("xpk.sh", verb, str(cloud.job))[0] == 0
  assert not [call for call in cloud.calls if call.startswith("xpk cluster")]
  assert all("--cluster=ours" in call for call in cloud.calls if call.startswith("xpk "))


def test_a_job_through_skypilot_ends_after_three_preemptions_and_nothing_is_left(cloud):
  assert cloud.run("sky.sh", "run", str(cloud.job))[0] == 0
  code, printed = cloud.run("sky.sh", "watch", str(cloud.job), PREEMPTIONS="3")
  assert code == 0, printed
  assert cloud.runs == 4 and cloud.left == []
  assert CANARY not in printed + cloud.texts()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_that_fails_is_not_repeated_and_nothing_is_left(cloud, script):
  cloud.with_python()
  (cloud.folder / "codes").write_text("2\n" * 9)
  for verb in ("create", "run") if script == "xpk.sh" else ("run",):
    assert cloud.run(script, verb, str(cloud.job))[0] == 0
  code, _ = cloud.run(script, "watch", str(cloud.job))
  assert code == (2 if script in SCRIPTS[:2] else 1)
  assert cloud.runs == 1 and cloud.left == []


def test_a_machine_that_preflight_refuses_trains_nothing(cloud):
  cloud.run("tpu_vm.sh", "run", str(cloud.job))
  code, _ = cloud.run("tpu_vm.sh", "watch", str(cloud.job), PREFLIGHT_CODE="1")
  assert code == 1 and cloud.runs == 0 and cloud.left == []
  assert "--topology=v5p:2x2x4 --skip=fit" in "\n".join(cloud.calls)


def test_want_of_machines_is_waited_for_and_a_wrong_job_is_not(cloud):
  cloud.run("queued_resource.sh", "run", str(cloud.job))
  refusals = cloud.folder / "refusals"
  refusals.write_text("RESOURCE_EXHAUSTED: no capacity\nUNAVAILABLE\n")
  assert cloud.run("queued_resource.sh", "watch", str(cloud.job))[0] == 0
  cloud.run("queued_resource.sh", "run", str(cloud.job))
  refusals.write_text("INVALID_ARGUMENT: no such runtime\n" * 3)
  code, printed = cloud.run("queued_resource.sh", "watch", str(cloud.job))
  assert code == 2 and "no such runtime" in printed and cloud.left == []


def test_a_watch_without_a_job_makes_nothing(cloud):
  code, printed = cloud.run("tpu_vm.sh", "watch", str(cloud.job))
  assert code == 2 and "run" in printed
  assert not [call for call in cloud.calls if " create " in call]


def test_what_exists_is_not_made_twice_and_what_is_gone_is_deleted_again(cloud):
  for _ in range(2):
    assert cloud.run("tpu_vm.sh", "create", str(cloud.job))[0] == 0
  assert len([call for call in cloud.calls if " create " in call]) == 1
  for _ in range(2):
    assert cloud.run("tpu_vm.sh", "delete", str(cloud.job))[0] == 0
  assert cloud.left == []


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_print_shows_commands_and_runs_none(cloud, script, verb):
  code, printed = cloud.run(script, verb, str(cloud.job), "--print")
  assert code == 0, printed
  assert any(line.split(" ")[0] in TOOLS for line in printed.splitlines())
  assert cloud.calls == [] and CANARY not in printed


def test_the_logs_of_a_machine_are_in_the_bucket(cloud):
  cloud.run("tpu_vm.sh", "run", str(cloud.job))
  cloud.run("tpu_vm.sh", "watch", str(cloud.job))
  code, printed = cloud.run("tpu_vm.sh", "logs", str(cloud.job))
  assert code == 0 and "the job ended with exit code 0" in printed


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ("HF_TOKEN=hf_abc", "secret"),
    ("FLAGS=--config=5b --api_key=abc", "secret"),
    ("COLOUR=red", "KEY=VALUE"),
    ("$(touch hacked)", "KEY=VALUE"),
    ("NAME=Stage_1", "NAME"),
    ("NAME=", "NAME is empty"),
    ("BUCKET=my-bucket", "gs://"),
    ("SLICES=none", "SLICES"),
    ("SPOT=maybe", "SPOT"),
    ("COMMAND=train; rm", "COMMAND"),
  ],
)
def test_a_mistake_in_a_job_is_told_and_nothing_runs(cloud, line, words):
  with cloud.job.open("a") as file:
    file.write(f"\n{line}\n")
  code, printed = cloud.run("tpu_vm.sh", "run", str(cloud.job))
  assert code == 2 and words in printed and "abc" not in printed
  assert cloud.calls == [] and not (ROOT / "hacked").exists()


def test_values_of_a_job_are_not_executed(cloud):
  with cloud.job.open("a") as file:
    file.write("\nFLAGS=--workdir=$(touch hacked) `touch hacked` --config=5b\n")
  cloud.run("tpu_vm.sh", "run", str(cloud.job))
  assert cloud.run("tpu_vm.sh", "watch", str(cloud.job))[0] == 0
  cloud.with_python()
  for verb in ("create", "run", "watch"):
    assert cloud.run("xpk.sh", verb, str(cloud.job))[0] == 0
  assert not (ROOT / "hacked").exists()


@pytest.mark.parametrize("code", [83, 84, 85, 134, 137, 143])
def test_the_retry_loop_goes_on_after_codes_that_another_attempt_changes(cloud, code):
  cloud.with_python()
  (cloud.folder / "codes").write_text(f"{code}\n{code}\n0\n")
  assert cloud.run("startup.sh", "train", "--config=tiny")[0] == 0
  assert cloud.runs == 3


@pytest.mark.parametrize("code", [1, 2, 130])
def test_the_retry_loop_ends_with_any_other_code(cloud, code):
  cloud.with_python()
  (cloud.folder / "codes").write_text(f"{code}\n")
  assert cloud.run("startup.sh", "train", "--config=tiny")[0] == code
  assert cloud.runs == 1


def test_the_retry_loop_gives_up_after_its_last_restart(cloud):
  cloud.with_python()
  (cloud.folder / "codes").write_text("84\n" * 9)
  assert cloud.run("startup.sh", "train", "--config=tiny", MAX_RESTARTS="2")[0] == 84
  assert cloud.runs == 3


def test_a_signal_lets_the_training_save_and_begins_no_other(cloud):
  cloud.with_python()
  program = "trap 'exit 83' TERM; touch $FAKE/begun; while true; do $SLEEP 0.01; done"
  stand_in = cloud.folder / "bin" / "python"
  stand_in.write_text(f"#!/usr/bin/env bash\n{program}\n")
  stand_in.chmod(0o755)
  process = cloud.start("startup.sh", "encode", "--config=tiny")
  while not (cloud.folder / "begun").exists():
    assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=30)
  assert process.returncode == 83 and output.count("ended with exit code") == 1
