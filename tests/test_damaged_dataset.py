"""A flipped bit of a dataset is named, with its repair, and `encode` run again mends it."""

import json

import numpy as np
import pytest
from drawn_dataset import ROW_TOKENS, make_dataset, make_rows
from etils import epath
from stored_examples import draw_example, write_dataset

from cogvideox_jax.data import encoded_by, mixture, packing, records, shard_notes
from cogvideox_jax.data.dataset_index import damaged_files
from cogvideox_jax.data.encoded_by import EncodedBy
from cogvideox_jax.data.loader import Loader
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.shards import ShardWriter
from cogvideox_jax.errors import UserError

CLIPS = 6


@pytest.fixture
def folder(tmp_path):
  """Two shards of three clips."""
  write_dataset(tmp_path, [draw_example(number) for number in range(CLIPS)])
  return tmp_path


def flip(path, place):
  data = bytearray(path.read_bytes())
  data[place] ^= 1 << place % 8
  path.write_bytes(data)


def test_a_clip_whose_record_is_damaged_names_shard_clip_and_repair(folder):
  shard = folder / records.shard_name(1, 2)
  flip(shard, 200)
  dataset = Dataset(folder)
  for clip in range(CLIPS):
    if clip != 3:
      assert dataset[clip].source == f"clip-{clip}"
  with pytest.raises(UserError) as caught:
    dataset[3]
  message = str(caught.value)
  assert str(shard) in message and "'clip-3'" in message and "Run the same encode" in message
  assert len(message.splitlines()) <= 8


def test_no_flipped_bit_of_a_shard_is_read_as_a_clip(folder):
  examples = [Dataset(folder)[clip] for clip in range(CLIPS)]
  wanted = [records.serialize(example) for example in examples]
  shard = folder / records.shard_name(0, 2)
  whole = shard.read_bytes()
  for place in np.linspace(0, len(whole) - 1, 60).astype(int).tolist():
    shard.write_bytes(whole)
    flip(shard, place)
    dataset = Dataset(folder)
    for clip in range(3):
      try:
        assert records.serialize(dataset[clip]) == wanted[clip]
      except UserError as error:
        assert str(shard) in str(error)


def test_the_message_passes_through_the_threads_that_read_ahead(tmp_path):
  dataset = make_dataset(tmp_path, range(30))
  shard = tmp_path / records.shard_name(0, 1)
  flip(shard, shard.stat().st_size // 3)
  history = mixture.begin({"": 1})
  batches = Loader({"": make_rows(dataset, row_tokens=ROW_TOKENS)}, history, rows=8).iterate()
  with pytest.raises(UserError, match=r"is damaged: the clip 'clip-\d+' cannot be read"):
    for _ in range(8):
      next(batches)
  batches.close()


def test_every_flipped_byte_of_the_index_is_one_message(folder):
  index = folder / "index.npz"
  whole = index.read_bytes()
  for place in range(0, len(whole), 7):
    index.write_bytes(whole)
    flip(index, place)
    with pytest.raises(UserError, match=r"index\.npz is damaged.*\nRun the same encode command"):
      Dataset(folder)


def test_a_record_of_encoders_with_a_flipped_digit_is_damaged_and_no_other_encoder(tmp_path):
  record = EncodedBy("tiny", "0" * 64, "1" * 64, "2" * 64, 0.7, "zeros", 8.0, "1")
  writer = ShardWriter(tmp_path, 1, "same", record)
  writer.write_shard(0, [draw_example(0)])
  writer.finalize()
  path = tmp_path / encoded_by.NAME
  path.write_text(path.read_text().replace("0" * 64, "8" + "0" * 63))
  with pytest.raises(UserError, match=r"encoded_by\.json is damaged"):
    Dataset(tmp_path)


def mend(folder):
  """What `encode` does when it is run again."""
  examples = [draw_example(number) for number in range(CLIPS)]
  writer = ShardWriter(folder, 2, shard_notes.identity("test"))
  discarded = [shard for shard in range(2) if writer.discard_damaged(shard)]
  written = writer.pending()
  for shard in written:
    writer.write_shard(shard, examples[3 * shard : 3 * shard + 3])
  writer.finalize()
  return discarded, written


@pytest.mark.parametrize("name", [records.shard_name(1, 2), "shards/00001.json", "index.npz"])
def test_encoding_again_mends_a_flipped_bit_anywhere(folder, name):
  before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
  for place in (30, len(before[folder / name]) // 2):
    flip(folder / name, place)
    assert mend(folder)[1] == ([] if name == "index.npz" else [1])
    assert {path: path.read_bytes() for path in before} == before
    assert damaged_files(folder) == []


def test_what_is_whole_is_not_written_again(folder):
  assert mend(folder) == ([], [])


def test_a_damaged_plan_says_what_to_do(folder):
  (folder / "shards.json").write_text('{"format": 2')
  with pytest.raises(UserError, match=r"shards\.json is damaged .*\nIf the dataset was made from"):
    ShardWriter(folder, 2, shard_notes.identity("test"))


def test_notes_of_earlier_versions_are_read_and_damaged_ones_are_none(tmp_path):
  path = epath.Path(tmp_path) / "note.json"
  note = {"clips": [{"source": "a"}], "refusals": [], "bytes": 9, "sha256": "0"}
  path.write_text(json.dumps(note))
  assert shard_notes.read(path) == note
  shard_notes.write(path, note)
  assert shard_notes.read(path) == note
  path.write_text(path.read_text().replace('"a"', '"b"'))
  assert shard_notes.read(path) is None
  for text in ("", "[]", "7", '{"clips": []}'):
    path.write_text(text)
    assert shard_notes.read(path) is None


def test_a_plan_with_a_flipped_byte_is_planned_again(tmp_path):
  folder = epath.Path(tmp_path)
  lengths = np.array([9, 3, 5, 7, 2])
  wanted = packing.cached_layout(lengths, 12, 4, folder)
  (plan,) = folder.iterdir()
  whole = plan.read_bytes()
  for place in range(0, len(whole), 3):
    plan.write_bytes(whole)
    flip(plan, place)
    for column, expected in zip(packing.cached_layout(lengths, 12, 4, folder), wanted, strict=True):
      np.testing.assert_array_equal(column, expected)
