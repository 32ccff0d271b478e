"""Shards of a dataset: kills lose nothing, and what cannot be written is one message."""

import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys

import pytest
from stored_examples import assert_stored, draw_example, write_dataset
from waiting import PATIENCE

from cogvideox_jax.data import records, shard_notes
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.shards import ShardWriter
from cogvideox_jax.errors import UserError

WRITER = """
import sys, time
from cogvideox_jax.data.shards import ShardWriter
from tests.stored_examples import draw_example
directory, stop_in = sys.argv[1], int(sys.argv[2])
writer = ShardWriter(directory, 6, "same")
for shard in writer.pending():
  def examples():
    for n in range(5 * shard, 5 * shard + 5):
      if shard == stop_in and n % 5 == 3:
        print("in the middle", flush=True)
        time.sleep(100)
      if n % 7:
        yield draw_example(n)
      else:
        refusals.append({"file": str(n), "line": n, "reason": "a multiple of 7"})
  refusals = []
  writer.write_shard(shard, examples(), refusals)
"""


def run_writer(directory, stop_in: int):
  command = [sys.executable, "-c", WRITER, directory, str(stop_in)]
  root = pathlib.Path(__file__).parents[1]
  return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


def test_a_killed_writer_goes_on_and_every_clip_is_stored_once(tmp_path):
  for shard in (1, 4):
    with run_writer(tmp_path, stop_in=shard) as process:
      assert process.stdout.readline() == "in the middle\n"
      process.send_signal(signal.SIGKILL)
  writer = ShardWriter(tmp_path, 6, "same")
  assert writer.pending() == [4, 5]
  assert len(list(tmp_path.glob("*.partial"))) == 1
  written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-of-00006")}

  with run_writer(tmp_path, stop_in=-1) as process:
    assert process.wait(timeout=PATIENCE) == 0
  assert writer.finalize() == (25, 5)
  assert written == {path: path.stat().st_mtime_ns for path in written}  # Not written again.
  assert not list(tmp_path.rglob("*.partial"))
  dataset = Dataset(tmp_path)
  assert [dataset[n].source for n in range(25)] == [f"clip-{n}" for n in range(30) if n % 7]
  assert [refusal["line"] for refusal in writer.refusals()] == [0, 7, 14, 21, 28]


def test_a_kill_between_a_note_and_its_shard_leaves_the_shard_pending(tmp_path):
  write_dataset(tmp_path, [draw_example(n) for n in range(6)])
  shard = tmp_path / records.shard_name(0, 2)
  shard.rename(shard.with_name(f"{shard.name}.partial"))
  writer = ShardWriter(tmp_path, 2, shard_notes.identity("test"))
  assert writer.pending() == [0]
  assert writer.refusals() == []


def test_a_folder_made_from_other_files_is_refused(tmp_path):
  ShardWriter(tmp_path, 2, shard_notes.identity({"files": ["a"], "fps": 8}))
  ShardWriter(tmp_path, 2, shard_notes.identity({"fps": 8, "files": ["a"]}))
  with pytest.raises(UserError, match=r"other files or settings\.\nChoose another --output"):
    ShardWriter(tmp_path, 2, shard_notes.identity({"files": ["a"], "fps": 16}))


def test_a_shard_cut_short_is_found_and_written_again(tmp_path):
  examples = [draw_example(n) for n in range(6)]
  write_dataset(tmp_path, examples)
  shard = tmp_path / records.shard_name(1, 2)
  os.truncate(shard, shard.stat().st_size // 2)
  with pytest.raises(UserError, match=re.escape(str(shard))):
    Dataset(tmp_path)
  writer = ShardWriter(tmp_path, 2, shard_notes.identity("test"))
  assert writer.pending() == [1]
  writer.write_shard(1, examples[3:])
  writer.finalize()
  assert_stored(Dataset(tmp_path)[5], examples[5])


def test_a_full_disk_is_a_clear_message_and_leaves_whole_shards(tmp_path):
  examples = [draw_example(n) for n in range(60)]
  writer = ShardWriter(tmp_path, 2, "x")
  writer.write_shard(0, examples[:2])
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
  try:
    with pytest.raises(UserError, match=r"cannot write .*\nFree some space"):
      writer.write_shard(1, examples)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert writer.pending() == [1]


def test_an_unwritable_folder_is_a_clear_message(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write"):
    ShardWriter(tmp_path / "file" / "dataset", 1, "x")


def test_a_failing_encoder_leaves_the_shard_unwritten(tmp_path):
  writer = ShardWriter(tmp_path, 1, "x")

  def examples():
    yield draw_example(0)
    raise KeyError("encoder")

  with pytest.raises(KeyError, match="encoder"):
    writer.write_shard(0, examples())
  assert writer.pending() == [0]
  assert json.loads((tmp_path / "shards.json").read_text())["num_shards"] == 1
