"""How commands leave: on signals at any time, and without a reader, a device or other processes."""

import os
import signal
import subprocess
import sys

import jax
import pytest
from waiting import PATIENCE, wait_until

from cogvideox_jax import devices, hosts, interrupts
from cogvideox_jax.errors import PREEMPTED, UserError

EARLY = """
import signal
from cogvideox_jax import interrupts
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # The tests may run under nohup.
interrupts.GRACE = 0.2
interrupts.leave_on_signals()
print(flush=True)
{}
"""


@pytest.mark.parametrize("number", interrupts.STOPS)
@pytest.mark.parametrize(
  "work",
  ["import time; time.sleep(600)", "import hashlib; hashlib.pbkdf2_hmac('md5', b'', b'', 2**30)"],
)
def test_a_signal_before_there_is_anything_to_save_leaves_with_83(number, work):
  """Also while a library computes, where Python cannot."""
  command = [sys.executable, "-c", EARLY.format(work)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
    assert process.stdout and process.stdout.readline()
    process.send_signal(number)
    try:
      assert process.wait(60) == PREEMPTED
    finally:
      process.kill()
    assert process.stderr and not process.stderr.read()


@pytest.fixture
def heard():
  """The terminal's end is heard, which it is not if the tests run under nohup."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", interrupts.STOPS)
def test_both_signals_ask_a_job_to_save_and_an_ignored_one_stays_ignored(number):
  with interrupts.Interrupts() as asked:
    signal.raise_signal(number)
  assert asked.exit_code == PREEMPTED
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As nohup does.
  try:
    with interrupts.Interrupts() as asked:
      signal.raise_signal(signal.SIGHUP)
    assert asked.exit_code is None
  finally:
    signal.signal(signal.SIGHUP, before)


PRINT = """
import sys
from cogvideox_jax import streams
with streams.lasting():
  for _ in range(20_000):
    print("a line of some length", flush=True)
    print("another", file=sys.stderr)
sys.exit(7)
"""


def test_a_pipe_that_nobody_reads_any_more_ends_no_command():
  command = [sys.executable, "-c", PRINT]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
    assert process.stdout and process.stderr and process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(PATIENCE) == 7


@pytest.mark.parametrize(
  "error",
  [
    RuntimeError("Unable to initialize backend 'tpu': none\nmore"),
    RuntimeError('multi-process lockfile. Run "$ sudo rm /tmp/libtpu_lockfile".'),
    AssertionError(),
  ],
)
def test_a_missing_accelerator_is_one_message(monkeypatch, error):
  def fail():
    raise error

  monkeypatch.setattr(jax, "devices", fail)
  with pytest.raises(UserError, match=r"JAX_PLATFORMS=cpu: there is no such device") as told:
    devices.open_devices()
  assert len(str(told.value).splitlines()) == 3 and "sudo" not in str(told.value)


@pytest.mark.parametrize("files", [[], ["/dev/accel0"]])
def test_what_libraries_print_about_tpus_is_dropped_where_there_is_none(monkeypatch, capfd, files):
  monkeypatch.setattr(devices.glob, "glob", lambda pattern: files)
  monkeypatch.setattr(jax, "devices", lambda: os.write(2, b"sudo rm\n"))
  devices.open_devices()
  assert capfd.readouterr().err == ("sudo rm\n" if files else "")


def test_a_process_says_what_it_waits_for_soon_and_again(monkeypatch, capsys):
  monkeypatch.setattr(hosts, "FIRST_WORD", 0.05)
  assert hosts.FIRST_WORD <= 10
  with hosts._said(hosts._waiting(hosts.Group("host:1", 2, 1))):
    wait_until(lambda: "process 1 cannot reach process 0 at host:1" in capsys.readouterr().err)
  assert "for the other 3 processes" in hosts._waiting(hosts.Group("host:1", 4, 0))
