"""Decoding in processes: what a file does to its process, no other file feels."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_hostile_video import encode
from waiting import wait_until

from cogvideox_jax.data import video
from cogvideox_jax.data.decoding import SMALLER, Decoders, File
from cogvideox_jax.data.mp4 import write_mp4
from cogvideox_jax.data.video import VideoError, Window
from cogvideox_jax.errors import UserError

CLIPS = Path(__file__).parent / "data" / "clips"
# A process in which the files of some names do what a decoder that is attacked may do.
ATTACKED = """
import os, signal, time
from cogvideox_jax.data import decode_worker, video
served, read_windows = [], video.read_windows

def attacked(path, windows, **settings):
  served.append(path.name)
  for index, frame in enumerate(read_windows(path, windows, **settings)):
    if index == 14 and path.name.startswith("crash"):
      os.kill(os.getpid(), signal.SIGSEGV)
    if index == 14 and path.name.startswith("leave"):
      os._exit(7)
    if path.name.startswith("hang"):
      time.sleep(1e6)
    if path.name.startswith("spin"):
      while True: pass
    if path.name.startswith("large"):
      bytearray(500 * 2**20)
    if index == 14 and path.name.startswith("poisoned") and len(served) > 1:
      os.kill(os.getpid(), signal.SIGBUS)
    yield frame

video.read_windows = attacked
decode_worker.SECONDS, decode_worker.PACE = 1.0, 0.0
decode_worker.main()
"""
ATTACK = (sys.executable, "-c", ATTACKED)
# Larger than the buffer of a process, so that pieces arrive before its last frame.
WINDOWS = [Window(0, 9, 64, 96), Window(9, 5, 64, 96), Window(3, 1, 64, 64)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
  """A file of 14 frames."""
  path = tmp_path_factory.mktemp("sound") / "sound.mp4"
  frames = np.random.default_rng(0).integers(0, 255, (14, 64, 64, 3), np.uint8)
  write_mp4(path, frames, 8.0)
  return path


def decode(paths, workers=2, **settings) -> list[list]:
  """The pieces of each file, and a reason where they end early."""
  results = []
  with Decoders(workers, **settings) as decoders:
    for pieces in decoders.decode(File(path, 8.0, lambda info: WINDOWS) for path in paths):
      results.append([])
      try:
        results[-1].extend(pieces)
      except VideoError as error:
        results[-1].append(str(error))
  return results


def check_sound(pieces: list, path: Path) -> None:
  assert [piece.number for piece in pieces] == [2, 0, 1]  # As their last frames come.
  whole = video.read(path, fps=8.0, num_frames=14, height=64, width=96)
  np.testing.assert_array_equal(pieces[1].frames, whole[:9])
  np.testing.assert_array_equal(pieces[2].frames, whole[9:])
  large = video.read(path, fps=8.0, num_frames=4, height=64, width=64)
  np.testing.assert_array_equal(pieces[0].frames, large[3:])


def test_known_windows_give_what_planned_windows_give(sound):
  taken = {"known": [], "planned": []}
  with Decoders(1) as decoders:
    decoders.read(File(sound, 8.0, WINDOWS), taken["known"].append).result()
    decoders.read(File(sound, 8.0, lambda info: WINDOWS), taken["planned"].append).result()
    with pytest.raises(VideoError, match="too short"):
      decoders.read(File(sound, 8.0, [Window(12, 9, 64, 96)]), taken["known"].append).result()
  for pieces in taken.values():
    check_sound(pieces, sound)


@pytest.mark.parametrize("workers", [1, 3])
def test_pieces_are_what_the_file_shows_whatever_the_number_of_processes(sound, workers):
  results = decode([sound, CLIPS / "lion.jpg", sound, "absent.mp4", sound, sound, sound], workers)
  for index in (0, 2, 4, 5, 6):
    check_sound(results[index], sound)
  assert results[1] == ["too short: 1 of 14 frames at 8 fps"]
  assert results[3] == ["the file is absent"]


def test_a_process_that_dies_costs_its_file_alone(sound, tmp_path):
  reasons = {
    "crash.mp4": "its decoder crashed (SIGSEGV)",
    "leave.mp4": "its decoder failed with exit code 7",
    "hang.mp4": "takes too long to decode",
    "spin.mp4": "takes too long to decode",
    "large.mp4": f"takes more than 448 MB of memory to decode; {SMALLER}",
  }
  paths = []
  for name in reasons:
    (tmp_path / name).symlink_to(sound)
    paths += [sound, tmp_path / name]
  results = decode([*paths, sound], command=ATTACK)
  for sound_one in results[::2]:
    check_sound(sound_one, sound)
  assert [attacked[-1] for attacked in results[1::2]] == list(reasons.values())


def test_a_file_does_not_answer_for_those_before_it(sound, tmp_path):
  """Its process dies of what another file did to it: a new one decodes it, each piece once."""
  (tmp_path / "poisoned.mp4").symlink_to(sound)
  results = decode([sound, tmp_path / "poisoned.mp4"], workers=1, command=ATTACK)
  for pieces in results:
    check_sound(pieces, sound)


def test_a_process_may_wait_for_its_next_file_as_long_as_it_must(sound):
  """Longer than a file may take: one second here."""
  with Decoders(1, command=ATTACK) as decoders:
    processes = []
    for _ in range(2):
      for pieces in decoders.decode([File(sound, 8.0, lambda info: WINDOWS)]):
        check_sound(list(pieces), sound)
      time.sleep(1.5)
      processes.append(decoders._workers[0]._running.process)
  assert processes[0] is processes[1]


def test_decoding_that_is_left_leaves_no_process(sound):
  with pytest.raises(KeyboardInterrupt), Decoders(2) as decoders:
    files = [File(sound, 8.0, lambda info: WINDOWS)] * 9
    next(next(decoders.decode(files)))
    processes = [worker._running.process for worker in decoders._workers if worker._running]
    raise KeyboardInterrupt
  assert processes and all(process.returncode is not None for process in processes)


def test_a_parent_that_is_killed_leaves_no_process(sound, tmp_path):
  program = f"""
import time
from cogvideox_jax.data.decoding import Decoders, File
from cogvideox_jax.data.video import Window
with Decoders(1) as decoders:
  next(next(decoders.decode([File({str(sound)!r}, 8.0, lambda info: [Window(0, 1, 32, 32)])])))
  print(decoders._workers[0]._running.process.pid, flush=True)
  time.sleep(100)
"""
  root = Path(__file__).parent.parent
  command = [sys.executable, "-c", program]
  with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as parent:
    worker = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)

  def has_ended() -> bool:
    try:
      state = Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
      return True
    return state == "Z"  # Nobody here collects what has ended.

  wait_until(has_ended)


def test_processes_that_do_not_start_are_no_fault_of_a_file(sound):
  with pytest.raises(UserError, match="does not start: its decoder failed with exit code 3"):
    decode([sound], command=(sys.executable, "-c", "raise SystemExit(3)"))


def test_a_decoding_process_takes_less_than_512_mb(tmp_path):
  """4K with as many reference frames as H.264 has, 5.3K as cameras have it, and 48 megapixels."""
  options = {"preset": "ultrafast", "threads": "1", "refs": "16", "bf": "8"}
  large = encode(tmp_path / "a.mp4", "libx264", (2160, 4096), 24, stream_options=options)
  image = encode(tmp_path / "b.mov", "mjpeg", (2160, 4096), 1)
  camera = encode(tmp_path / "c.mp4", "libx264", (2988, 5312), 2)
  Image.new("RGB", (8064, 6048)).save(tmp_path / "d.jpg")
  with Decoders(1) as decoders:
    plan, few = ([Window(0, n, 768, 1360), Window(0, n, 256, 384)] for n in (8, 1))
    windows = {large: plan, image: [], camera: few, tmp_path / "d.jpg": few}
    files = (File(path, 8.0, lambda _, path=path: windows[path]) for path in windows)
    given = [len(list(pieces)) for pieces in decoders.decode(files)]
    assert given == [2, 0, 2, 2]
    worker = decoders._workers[0]._running.process.pid
    lines = Path(f"/proc/{worker}/status").read_text().splitlines()
  peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
  print(peak / 1024)
  assert peak < 512 * 1024
