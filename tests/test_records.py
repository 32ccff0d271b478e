"""Encoded datasets: what is written is read back, kills lose nothing, TFDS opens the result."""

import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds

from cogvideox_jax.data import dataset_index, records, shard_notes
from cogvideox_jax.data.clips import clip_name
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.shards import ShardWriter
from cogvideox_jax.errors import UserError
from cogvideox_jax.types import Caption, Example


def draw_example(number: int, *, frames: int = 3) -> Example:
  rng = np.random.default_rng(number)
  shape = (frames, 4, 6, 16)
  return Example(
    mean=rng.normal(size=shape).astype(np.float32),
    logvar=rng.uniform(-30, 20, size=shape).astype(np.float32),
    text=rng.normal(size=(5, 8)).astype(np.float32),
    caption=f"a célebre clip, number {number} 🎬",
    source=f"clip-{number}",
    num_frames=4 * frames - 3,
    height=32,
    width=48,
    fps=7.5,
  )


def write_dataset(directory, examples, *, clips_in_a_shard=3) -> Dataset:
  starts = range(0, len(examples), clips_in_a_shard)
  writer = ShardWriter(directory, len(starts), shard_notes.identity("test"))
  for shard, start in enumerate(starts):
    writer.write_shard(shard, examples[start : start + clips_in_a_shard])
  writer.finalize()
  return Dataset(directory)


def assert_stored(found: Example, example: Example):
  """Equal up to the rounding of the types they are stored in."""
  assert found.mean.dtype == found.logvar.dtype == np.float16
  assert found.text.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(found.mean, example.mean.astype(np.float16))
  np.testing.assert_array_equal(found.logvar, example.logvar.astype(np.float16))
  np.testing.assert_array_equal(found.text, example.text.astype(ml_dtypes.bfloat16))
  assert found[3:] == example[3:]


def test_an_example_survives_storage_up_to_its_rounding(tmp_path):
  examples = [draw_example(n, frames=1 + n % 3) for n in range(7)]
  dataset = write_dataset(tmp_path, examples)
  assert len(dataset) == 7
  for number, example in enumerate(examples):
    assert_stored(dataset[number], example)
    assert dataset.source(number) == example.source


def test_the_index_describes_every_clip(tmp_path):
  examples = [draw_example(n, frames=1 + n % 3) for n in range(7)]
  index = write_dataset(tmp_path, examples).index
  assert [tuple(shape) for shape in index.latent_shape] == [x.mean.shape for x in examples]
  assert [tuple(shape) for shape in index.text_shape] == [x.text.shape for x in examples]
  np.testing.assert_array_equal(index.num_frames, [x.num_frames for x in examples])
  assert set(index.height) == {32}
  assert set(index.width) == {48}
  assert set(index.fps) == {7.5}
  assert len(set(index.source_hash)) == 7


def draw_captioned(number: int, captions: int, score: float | None) -> Example:
  rng = np.random.default_rng(number)
  others = (Caption(f"another, {k}", rng.normal(size=(5, 8))) for k in range(captions - 1))
  return draw_example(number)._replace(score=score, others=tuple(others))


def test_all_captions_of_a_clip_and_its_score_are_stored(tmp_path):
  examples = [draw_captioned(0, 1, None), draw_captioned(1, 3, 0.25), draw_captioned(2, 2, -1e3)]
  dataset = write_dataset(tmp_path, examples)
  np.testing.assert_array_equal(dataset.index.captions, [1, 3, 2])
  np.testing.assert_array_equal(dataset.index.score, np.float32([np.nan, 0.25, -1e3]))
  for number, example in enumerate(examples):
    assert dataset[number].score == example.score
    for caption in range(1 + len(example.others)):
      assert_stored(dataset[number].with_caption(caption), example.with_caption(caption))
  used = dataset[1].with_caption(2)
  assert (used.caption, used.others) == ("another, 1", ())
  assert not np.array_equal(used.text, dataset[1].text)


def test_images_are_stored_where_there_are_any(tmp_path):
  image = np.random.default_rng(0).normal(size=(3, 2, 4, 6, 2)).astype(np.float32)
  plain = draw_example(0)
  dataset = write_dataset(tmp_path, [plain, draw_example(1)._replace(image=image)])
  assert dataset.index.images.tolist() == [0, 3]
  assert dataset[0].image is None
  np.testing.assert_array_equal(dataset[1].image, image.astype(np.float16))
  image[2, 1, 0, 0, 0] = 1e6
  assert records.storage_fault(plain._replace(image=image)) == "its image is not finite in float16"


def test_the_transfer_of_hdr_is_stored_and_sdr_costs_nothing(tmp_path):
  sdr = draw_example(0)
  hdr = sdr._replace(source="hdr", transfer="hlg")
  dataset = write_dataset(tmp_path, [sdr, hdr])
  assert [dataset[n].transfer for n in range(2)] == ["sdr", "hlg"]
  assert b"transfer" not in records.serialize(sdr)  # As of versions that did not know it.


def test_one_caption_costs_no_more_than_its_own_states():
  one, two = (len(records.serialize(draw_captioned(0, count, 0.5))) for count in (1, 2))
  states = 2 * 5 * 8
  assert states < two - one < states + 40  # The other caption's words and a few bytes.


def test_every_process_stores_the_same_bytes():
  """Three of them: with TFDS's own order of the fields, they differ nearly always."""
  program = (
    "import hashlib; from cogvideox_jax.data import records; from tests.test_records import *; "
    "print(hashlib.sha256(records.serialize(draw_captioned(1, 3, 0.5))).hexdigest())"
  )
  root = pathlib.Path(__file__).parents[1]
  command = [sys.executable, "-c", program]
  runs = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) for _ in range(3)]
  assert len({run.communicate(timeout=60)[0] for run in runs}) == 1
  assert not any(run.returncode for run in runs)


def test_clips_that_are_cut_from_a_file_share_its_hash(tmp_path):
  """So that none of them validates what another trains."""
  names = ["a.mp4", "b.mp4", clip_name("a.mp4", 0), clip_name("a.mp4", 12)]
  examples = [draw_example(n)._replace(source=name) for n, name in enumerate(names)]
  whole, other, *cut = write_dataset(tmp_path, examples).index.source_hash
  assert cut == [whole, whole] and other != whole


def test_tfds_opens_a_dataset_and_nothing_imports_tensorflow(tmp_path):
  examples = [draw_captioned(n, 1 + n % 2, 0.5) for n in range(4)]
  writer = ShardWriter(tmp_path, 3, "x")
  writer.write_shard(0, examples[:3])
  writer.write_shard(1, [], [{"file": "bad.mp4", "line": 4, "reason": "zero length"}])
  writer.write_shard(2, examples[3:])
  assert writer.finalize() == (4, 1)
  program = f"""
import sys
import tensorflow_datasets as tfds
from cogvideox_jax.data import loader
source = tfds.builder_from_directory({str(tmp_path)!r}).as_data_source()["train"]
print(len(source), [source[n]["source"].decode() for n in range(4)], source[3]["mean"].dtype)
print(*(caption.decode() for caption in source[3]["captions"]), source[3]["text"].shape, sep="; ")
assert "tensorflow" not in sys.modules
"""
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
  )
  assert done.stdout == (
    f"4 {[x.source for x in examples]} float16\n{examples[3].caption}; another, 0; (2, 5, 8)\n"
  )
  assert_stored(Dataset(tmp_path)[2], examples[2])


def test_features_file_lets_tfds_decode_text_states(tmp_path):
  write_dataset(tmp_path, [draw_example(0)])
  (found,) = tfds.builder_from_directory(tmp_path).as_data_source(split="train")
  expected = draw_example(0).text.astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(found["text"].view(ml_dtypes.bfloat16), expected[None])


WRITER = """
import sys, time
from cogvideox_jax.data.shards import ShardWriter
from tests.test_records import draw_example
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
    assert process.wait(timeout=60) == 0
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


def test_every_changed_byte_of_a_dataset_is_found(tmp_path):
  write_dataset(tmp_path, [draw_example(n) for n in range(6)])
  subprocess.run(["sha256sum", "--check", "--quiet", "sha256sums.txt"], cwd=tmp_path, check=True)
  assert dataset_index.damaged_files(tmp_path) == []
  shard, index = tmp_path / records.shard_name(1, 2), tmp_path / "index.npz"
  for path in (shard, index):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
  assert dataset_index.damaged_files(tmp_path) == [shard.name, "index.npz"]
  shard.unlink()
  assert dataset_index.damaged_files(tmp_path) == [shard.name, "index.npz"]


def test_the_same_records_have_the_same_digest_and_others_another(tmp_path):
  one = write_dataset(tmp_path / "one", [draw_example(n) for n in range(4)])
  same = write_dataset(tmp_path / "same", [draw_example(n) for n in range(4)])
  other = write_dataset(tmp_path / "other", [draw_example(n) for n in (0, 1, 2, 9)])
  assert one.digest == same.digest != other.digest


def test_a_folder_made_from_other_files_is_refused(tmp_path):
  ShardWriter(tmp_path, 2, shard_notes.identity({"files": ["a"], "fps": 8}))
  ShardWriter(tmp_path, 2, shard_notes.identity({"fps": 8, "files": ["a"]}))
  with pytest.raises(UserError, match=r"other files or settings\.\nChoose another --output"):
    ShardWriter(tmp_path, 2, shard_notes.identity({"files": ["a"], "fps": 16}))


def test_a_dataset_of_an_earlier_version_says_what_to_do(tmp_path):
  write_dataset(tmp_path, [draw_example(0)])
  with np.load(tmp_path / "index.npz") as arrays:
    older = {name: array for name, array in arrays.items() if name not in ("captions", "score")}
  np.savez(tmp_path / "index.npz", **older)
  with pytest.raises(UserError, match=r"earlier version.*lacks captions, score\.\nEncode"):
    Dataset(tmp_path)


def test_what_is_no_dataset_says_what_to_do(tmp_path):
  with pytest.raises(UserError, match="not an encoded dataset"):
    Dataset(tmp_path)
  with pytest.raises(UserError, match=r"no sha256sums\.txt"):
    dataset_index.damaged_files(tmp_path)
  with pytest.raises(UserError, match="no clips were found"):
    ShardWriter(tmp_path, 0, "x")
  writer = ShardWriter(tmp_path, 1, "x")
  with pytest.raises(ValueError, match="lacks 1 of 1 shards"):
    writer.finalize()
  writer.write_shard(0, [], [{"file": "a", "line": 1, "reason": "r"}])
  assert writer.finalize() == (0, 1)
  with pytest.raises(UserError, match=r"every clip was refused, see quarantine\.jsonl"):
    Dataset(tmp_path)


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


def test_a_damaged_index_is_a_clear_message(tmp_path):
  write_dataset(tmp_path, [draw_example(0)])
  index = tmp_path / "index.npz"
  index.write_bytes(index.read_bytes()[:-40])
  with pytest.raises(UserError, match="damaged"):
    Dataset(tmp_path)


def test_numbers_that_cannot_be_stored_are_a_fault_of_the_clip():
  example = draw_example(0)
  assert records.storage_fault(example) is None
  beyond = example._replace(mean=example.mean * 1e6)
  assert records.storage_fault(beyond) == "its mean is not finite in float16"
  large_text = example._replace(text=example.text * 1e6)
  assert records.storage_fault(large_text) is None  # Beyond float16, not beyond bfloat16.
  assert records.storage_fault(example._replace(caption="\udcff")) == (
    "its caption is not valid Unicode"
  )
  with pytest.raises(ValueError, match="'clip-0' cannot be stored"):
    records.serialize(beyond)


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
