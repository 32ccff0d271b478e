"""Encoding by several processes, as on several hosts: the same bytes, whoever dies on the way."""

import signal
import socket
from pathlib import Path

import jax
import pytest
from commands import OWN_DEVICES, Running
from small_encodings import make_encoders, small_config, write_clips
from test_precompute_stops import wait_to_be_killed
from typed_config import typed
from waiting import wait_until

from cogvideox_jax import hosts
from cogvideox_jax.errors import UserError
from cogvideox_jax.precompute import encode_clips

TWO_DEVICES = f"{OWN_DEVICES} --xla_force_host_platform_device_count=2"


def encode_here(
  clips: Path, output: Path, model: str, port: int, count: int, index: int, victim: int | None
) -> None:
  """What each process does; the victim is to be killed when there is a shard."""
  if index == victim:
    wait_to_be_killed(output, 1)
  encode_clips.SHARD_ITEMS, hosts.HEARTBEAT = 4, 3
  if count > 1:
    hosts.join(hosts.Group(f"127.0.0.1:{port}", count, index))
  print(encode_clips.encode(typed(small_config()), clips, output, model, workers=1))


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory, clips, model):
  """Starts so many processes that write to a folder together."""

  def call(output: Path, count: int, victim: int | None = None) -> list[Running]:
    port = free_port()
    return [
      Running(
        tmp_path_factory.mktemp("said"), encode_here, clips, output, model, port, count, index,
        victim,
        xla_flags=TWO_DEVICES,
      )
      for index in range(count)
    ]  # fmt: skip

  return call


def finish(processes: list[Running]) -> list[tuple[int | None, str]]:
  """Exit code and last line of each; Gloo has lines of its own."""
  ended = [process.wait() for process in processes]
  return [(result.code, "".join(result.output.splitlines()[-1:])) for result in ended]


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
def alone(tmp_path_factory, start):
  """What one process writes."""
  output = tmp_path_factory.mktemp("alone") / "out"
  [(code, text)] = finish(start(output, 1))
  assert (code, text) == (0, "Counts(clips=25, refused=1)")
  return contents(output)


def test_two_processes_write_what_one_does(tmp_path, start, alone):
  ended = finish(start(tmp_path / "out", 2))
  assert ended == [(0, "Counts(clips=25, refused=1)")] * 2
  assert contents(tmp_path / "out") == alone


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_job_which_goes_on_when_started_again(
  tmp_path, start, alone, victim
):
  output = tmp_path / "out"
  processes = start(output, 2, victim)
  wait_until(
    lambda: [*output.glob("tiny/*.array_record-*-of-00007")],
    runs=lambda: processes[victim].poll() is None,
  )
  processes[victim].send_signal(signal.SIGKILL)
  codes = [code for code, _ in finish(processes)]
  assert codes[victim] == -signal.SIGKILL and codes[1 - victim] != 0
  assert not (output / "tiny" / "index.npz").exists()
  assert [code for code, _ in finish(start(output, 2))] == [0, 0]
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
