"""Encoded datasets: what is written is read back, damage is found, TFDS opens the result."""

import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from stored_examples import assert_stored, draw_captioned, draw_example, write_dataset
from waiting import PATIENCE

from cogvideox_jax.data import dataset_index, records
from cogvideox_jax.data.clips import clip_name
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.shards import ShardWriter
from cogvideox_jax.errors import UserError


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
    "import hashlib; from cogvideox_jax.data import records; from tests.stored_examples import *; "
    "print(hashlib.sha256(records.serialize(draw_captioned(1, 3, 0.5))).hexdigest())"
  )
  root = pathlib.Path(__file__).parents[1]
  command = [sys.executable, "-c", program]
  runs = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) for _ in range(3)]
  assert len({run.communicate(timeout=PATIENCE)[0] for run in runs}) == 1
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
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=True
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
