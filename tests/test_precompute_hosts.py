"""Encoding by several processes, as on several hosts: the same bytes, whoever dies on the way."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from test_precompute import ROOT, make_encoders, write_clips

from cogvideox_jax import hosts
from cogvideox_jax.errors import UserError

RUN = """
import sys
from cogvideox_jax import hosts
from cogvideox_jax.config.read import read
from cogvideox_jax.precompute import encode_clips
from cogvideox_jax.config.schema import TrainConfig
from configs import tiny
encode_clips.SHARD_ITEMS, hosts.HEARTBEAT = 4, 3
clips, output, model, port, count, index = sys.argv[1:]
if int(count) > 1:
  hosts.join(hosts.Group(f"127.0.0.1:{port}", int(count), int(index)))
config = tiny.get_config()
config.model.text_length = 6
config.stages.tiny.update(sizes=((16, 16), (8, 16)), durations=(1, 9))
print(encode_clips.encode(read(TrainConfig, config), clips, output, model, workers=1))
"""


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def start(clips: Path, output: Path, model: str, count: int) -> list[subprocess.Popen]:
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "2"}
  command = [sys.executable, "-c", RUN, str(clips), str(output), model, str(free_port())]
  return [
    subprocess.Popen(
      [*command, str(count), str(index)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    for index in range(count)
  ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
  """Exit code and last line of each; Gloo has lines of its own."""
  outputs = [process.communicate(timeout=120)[0] for process in processes]
  lines = [output.splitlines()[-1] if output else "" for output in outputs]
  return [(process.returncode, line) for process, line in zip(processes, lines, strict=True)]


def contents(output: Path) -> dict[str, bytes]:
  return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return make_encoders(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  clips = write_clips(tmp_path_factory.mktemp("hosts") / "clips", 26)
  (clips / "013.mp4").write_bytes(b"x")
  return clips


@pytest.fixture(scope="module")
def alone(tmp_path_factory, clips, model):
  """What one process writes."""
  output = tmp_path_factory.mktemp("alone") / "out"
  [(code, text)] = finish(start(clips, output, model, 1))
  assert (code, text) == (0, "Counts(clips=25, refused=1)")
  return contents(output)


def test_two_processes_write_what_one_does(tmp_path, clips, model, alone):
  ended = finish(start(clips, tmp_path / "out", model, 2))
  assert ended == [(0, "Counts(clips=25, refused=1)")] * 2
  assert contents(tmp_path / "out") == alone


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_job_which_goes_on_when_started_again(
  tmp_path, clips, model, alone, victim
):
  output = tmp_path / "out"
  processes = start(clips, output, model, 2)
  deadline = time.monotonic() + 120
  while len(list(output.glob("tiny/*.array_record-*-of-00007"))) < 1:
    assert processes[victim].poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  processes[victim].send_signal(signal.SIGKILL)
  codes = [code for code, _ in finish(processes)]
  assert codes[victim] == -signal.SIGKILL and codes[1 - victim] != 0
  assert not (output / "tiny" / "index.npz").exists()
  assert [code for code, _ in finish(start(clips, output, model, 2))] == [0, 0]
  assert contents(output) == alone


@pytest.mark.parametrize(
  "group", [hosts.Group("", 2, 0), hosts.Group("127.0.0.1:1", 2, 2), hosts.Group("", 1, 1)]
)
def test_a_group_that_cannot_be_is_refused(group):
  with pytest.raises(UserError, match=f"no process {group.index} of {group.count}"):
    hosts.join(group)


@pytest.mark.parametrize("said", ["Number of processes must be defined.", "no such cluster"])
def test_half_a_cluster_is_no_process_alone(monkeypatch, said):
  def initialize(**_):
    raise ValueError(said)

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  with pytest.raises(UserError, match=f"do not know one another: {said}"):
    hosts.join(hosts.Group())
