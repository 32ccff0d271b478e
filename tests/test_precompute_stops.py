"""Encoding that is stopped, killed or out of room, and goes on when it is started again."""

import json
import math
import resource
import signal
import time
from functools import partial

import pytest
from commands import Running, start_command
from small_encodings import encode, make_encoders, small_config, sources, write_clips
from typed_config import typed
from waiting import PATIENCE, wait_until

from cogvideox_jax.data.shards import OpenShard
from cogvideox_jax.errors import UserError
from cogvideox_jax.precompute import encode_clips


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return make_encoders(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config():
  return small_config()


def test_a_full_disk_is_one_clear_message(tmp_path, model, config):
  clips, output = write_clips(tmp_path / "clips", 12), tmp_path / "out"
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
  try:
    with pytest.raises(UserError, match=r"cannot write .*\nFree some space"):
      encode(typed(config), clips, output, model)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert encode(typed(config), clips, output, model) == (12, 0)


def test_an_interrupt_says_how_to_go_on(tmp_path, model):
  clips = write_clips(tmp_path / "clips", 1)
  lines = [{"file": "000.mp4", "caption": "x", "id": f"{index}"} for index in range(4000)]
  (clips / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
  flags = [
    "--config=configs/tiny.py",
    f"--input={clips}",
    f"--output={tmp_path / 'out'}",
    f"--model={model}",
  ]
  changes = ["--config.stages.tiny.sizes=((16,16),)", "--config.model.text_length=6"]
  process = start_command(tmp_path, "encode", *flags, *changes)
  wait_until(lambda: "Encoding" in process.errors, runs=lambda: process.poll() is None)
  process.send_signal(signal.SIGINT)
  ended = process.wait()
  assert ended.code == 130
  assert (
    ended.output
    == f"Whole shards are kept in {tmp_path / 'out'}: the same command goes on from there.\n"
  )
  assert ended.errors.rstrip().endswith("Interrupted.")


def wait_to_be_killed(output, shards):
  """Before it finishes a shard, once there are so many."""
  close = OpenShard.close

  def wait_or_close(shard, refusals):
    if len(list(output.glob("tiny/*.array_record-*-of-*[0-9]"))) >= shards:
      time.sleep(PATIENCE)
    close(shard, refusals)

  OpenShard.close = wait_or_close


def encode_in_shards_of_four(clips, output, model, shards):
  """What a process does that is killed after so many shards."""
  wait_to_be_killed(output, shards)
  encode_clips.SHARD_ITEMS = 4
  encode(typed(small_config()), clips, output, model)


def test_a_killed_run_started_again_holds_each_clip_once(tmp_path, model):
  clips, output = write_clips(tmp_path / "clips", 24), tmp_path / "out"
  run = partial(Running, tmp_path, encode_in_shards_of_four, clips, output, model)
  killed = run(2)
  shards = partial(output.glob, "tiny/*.array_record-*-of-00006")
  wait_until(lambda: len(list(shards())) >= 2, runs=lambda: killed.poll() is None)
  killed.kill()
  assert not (output / "tiny" / "index.npz").exists()
  assert run(math.inf).wait().code == 0
  assert sorted(sources(output)) == sorted(f"{index:03d}" for index in range(24)) or sorted(
    sources(output)
  ) == sorted(f"{index:03d}.mp4" for index in range(24))


def test_a_damaged_shard_is_encoded_again_and_the_others_are_not(
  tmp_path, model, config, monkeypatch, capsys
):
  monkeypatch.setattr(encode_clips, "SHARD_ITEMS", 2)
  clips, output = write_clips(tmp_path / "clips", 4), tmp_path / "out"
  encode(typed(config), clips, output, model)
  one, other = sorted(output.glob("tiny/*.array_record*"))
  whole, before = other.read_bytes(), one.stat().st_mtime_ns
  other.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  assert encode(typed(config), clips, output, model) == (4, 0)
  assert other.read_bytes() == whole and one.stat().st_mtime_ns == before
  assert "shard 1 is damaged and is encoded again" in capsys.readouterr().out
