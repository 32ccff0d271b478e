"""Clips that are decoded while training runs: which a batch holds, and what keeps that so."""

import json
import os
import shutil
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from cogvideox_jax.data import clip_reading, video
from cogvideox_jax.data.buckets import Bucket
from cogvideox_jax.data.clip_batches import ClipBatches
from cogvideox_jax.data.clips import source_hash
from cogvideox_jax.data.decoding import Decoders
from cogvideox_jax.data.measured_clips import measure
from cogvideox_jax.data.mp4 import write_mp4
from cogvideox_jax.data.video import read
from cogvideox_jax.errors import UserError

SIZES, DURATIONS, FPS = ((16, 16), (16, 24)), (1, 5), 8.0
SQUARE, WIDE, STILL = Bucket(5, 16, 16), Bucket(5, 16, 24), Bucket(1, 16, 16)
# Of each bucket, the clips of the files below.
COUNTS = {STILL: 3, SQUARE: 7, WIDE: 3}
STATM = Path("/proc/self/statm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Videos that give one clip, one that gives four, and images; each frame is noise."""
  folder = tmp_path_factory.mktemp("clips")
  rng = np.random.default_rng(0)
  shapes = [(5, 16, 16)] * 3 + [(21, 16, 16)] + [(5, 16, 24)] * 3 + [(1, 16, 16)] * 3
  names = [f"{index}.mp4" for index in range(len(shapes))]
  for name, shape in zip(names, shapes, strict=True):
    write_mp4(folder / name, rng.integers(0, 255, (*shape, 3), np.uint8), FPS)
  write_manifest(folder, names)
  return folder


def write_manifest(folder, names):
  lines = [json.dumps({"file": name, "caption": "noise"}) + "\n" for name in names]
  (folder / "manifest.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def decoders():
  with Decoders(2) as decoders:
    yield decoders


@pytest.fixture(scope="module")
def clips(folder, decoders):
  return measure(folder, SIZES, DURATIONS, FPS, decoders)


def make_batches(clips, decoders, **changed) -> ClipBatches:
  return ClipBatches(clips, decoders, **{"frames": 10, "seed": 0} | changed)


def take(batches, count, start=0, rows=None) -> list[np.ndarray]:
  with closing(batches.iterate(start, rows)) as iterator:
    return list(islice(iterator, count))


def clips_of(batches: list[np.ndarray]) -> Counter:
  """How often each clip stands in the batches, by its bytes."""
  return Counter((clip.shape, clip.tobytes()) for batch in batches for clip in batch)


def same(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others, strict=True):
    np.testing.assert_array_equal(batch, other)


def test_a_file_gives_as_many_clips_as_it_is_long(clips):
  assert {bucket: len(found.files) for bucket, found in clips.by_bucket.items()} == COUNTS
  files, starts = clips.by_bucket[SQUARE]
  assert starts[files == 3].tolist() == [0, 5, 10, 15]
  assert clips.num_clips == 13
  assert not clips.refusals


def test_a_clip_is_its_window_of_its_file(folder, clips, decoders):
  batches = make_batches(clips, decoders)
  shown = clips_of(take(batches, batches.per_epoch))
  whole = video.read(folder / "3.mp4", fps=FPS, num_frames=20, height=16, width=16)
  for start in (0, 5, 10, 15):
    assert shown[(5, 16, 16, 3), whole[start : start + 5].tobytes()] >= 1


@pytest.mark.parametrize("multiple_of", [1, 2])
def test_an_epoch_holds_every_clip_and_fills_a_bucket_s_last_batch_from_its_front(
  clips, decoders, multiple_of
):
  batches = make_batches(clips, decoders, frames=15, multiple_of=multiple_of)
  sizes = {SQUARE: 3 if multiple_of == 1 else 2, WIDE: 3 if multiple_of == 1 else 2}
  sizes[STILL] = 15 if multiple_of == 1 else 14
  expected = {bucket: -(-COUNTS[bucket] // size) for bucket, size in sizes.items()}
  assert batches.per_epoch == sum(expected.values())
  for epoch in range(2):
    slots = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
    assert {batches.epoch(k) for k in slots} == {epoch}
    assert Counter(batches.sizes_of(k).bucket for k in slots) == expected
    given = take(batches, batches.per_epoch, slots[0])
    for k, batch in zip(slots, given, strict=True):
      bucket, count = batches.sizes_of(k)
      assert batch.shape == (sizes[bucket], *bucket, 3)
      assert count == sizes[bucket]
    for bucket, size in sizes.items():
      shown = Counter(
        {clip: times for clip, times in clips_of(given).items() if clip[0] == (*bucket, 3)}
      )
      assert len(shown) == COUNTS[bucket]  # So every clip is there,
      assert shown.total() == expected[bucket] * size
      assert max(shown.values()) - min(shown.values()) <= 1  # and those of the front once more.


def test_a_batch_of_more_frames_than_asked_for_holds_a_clip_a_shard(clips, decoders):
  batches = make_batches(clips, decoders, frames=1, multiple_of=4)
  assert {batches.sizes_of(k).clips for k in range(batches.per_epoch)} == {4}


def test_epochs_and_seeds_differ(clips, decoders):
  batches = make_batches(clips, decoders)
  first, second = (take(batches, batches.per_epoch, n * batches.per_epoch) for n in range(2))
  other = take(make_batches(clips, decoders, seed=1), batches.per_epoch)
  orders = [[batch.tobytes() for batch in epoch] for epoch in (first, second, other)]
  assert orders[0] != orders[1] != orders[2] != orders[0]
  assert set(clips_of(first)) == set(clips_of(second))


def test_a_batch_follows_from_the_seed_and_its_number(folder, clips, decoders):
  """Not from where the reading began, nor the processes, nor another measuring."""
  whole = take(make_batches(clips, decoders), 13)
  same(take(make_batches(clips, decoders), 8, start=5), whole[5:])
  np.testing.assert_array_equal(make_batches(clips, decoders).batch(9), whole[9])
  with Decoders(5) as others:
    again = measure(folder, SIZES, DURATIONS, FPS, others)
    assert again.digest() == clips.digest()
    same(take(make_batches(again, others), 13), whole)


def test_hosts_read_the_rows_that_they_ask_for(clips, decoders):
  batches = make_batches(clips, decoders, multiple_of=2)
  whole = take(batches, 9)
  for host in range(2):
    mine = take(batches, 9, rows=lambda count, host=host: range(host, count, 2))
    same(mine, [batch[host::2] for batch in whole])


def test_a_batch_decodes_a_file_once_for_all_its_clips(clips, decoders, monkeypatch):
  asked = []
  read = decoders.read

  def counting(file, take):
    asked.append(file.path.name)
    return read(file, take)

  monkeypatch.setattr(decoders, "read", counting)
  make_batches(clips, decoders, frames=100).batch(0)
  assert len(asked) == len(set(asked))


@pytest.mark.parametrize("bytes_ahead", [0, 10**5])
def test_reading_ahead_is_bounded(clips, decoders, monkeypatch, bytes_ahead):
  monkeypatch.setattr(clip_reading, "READ_AHEAD_BYTES", bytes_ahead)
  batches = make_batches(clips, decoders)
  started = []
  start = batches.start

  def counting(k, rows):
    started.append(start(k, rows))
    return started[-1]

  monkeypatch.setattr(batches, "start", counting)
  with closing(batches.iterate()) as iterator:
    for taken in range(1, 40):
      next(iterator)
      ahead = [reading.frames.nbytes for reading in started[taken - 1 :]]
      assert sum(ahead[:-1]) <= bytes_ahead
      assert len(ahead) <= clip_reading.READ_AHEAD_BATCHES


def copies_of(folder, target):
  """A folder of the same clips whose files may be changed."""
  target.mkdir()
  for file in folder.iterdir():
    (target / file.name).write_bytes(file.read_bytes())
  return target


def test_a_file_that_fails_later_is_named_once_and_replaced_by_the_next_clip(
  folder, decoders, tmp_path, caplog
):
  own = copies_of(folder, tmp_path / "own")
  clips = measure(own, SIZES, DURATIONS, FPS, decoders)
  sound = make_batches(clips, decoders, frames=5)
  shown = {k: sound.batch(k) for k in range(sound.per_epoch)}
  (own / "1.mp4").write_bytes(b"no video")
  lost = video.read(folder / "1.mp4", fps=FPS, num_frames=5, height=16, width=16)
  (bad,) = (k for k, batch in shown.items() if batch[0].tobytes() == lost.tobytes())
  permutation = sound._epoch_plan(0).permutations[SQUARE].tolist()
  after = permutation[(permutation.index(1) + 1) % len(permutation)]
  file, start = (int(column[after]) for column in clips.by_bucket[SQUARE])
  name = clips.files[file].file
  expected = video.read(name, fps=FPS, num_frames=start + 5, height=16, width=16)[start:]
  for begin in (0, bad):  # However much was read before.
    batches = make_batches(clips, decoders, frames=5)
    caplog.clear()
    given = take(batches, 2 * batches.per_epoch - begin, begin)
    for k, batch in enumerate(given[: sound.per_epoch - begin], begin):
      np.testing.assert_array_equal(batch[0], expected if k == bad else shown[k][0])
    assert caplog.text.count("1.mp4") == 1


def test_clips_before_the_damage_of_a_file_are_used(folder, decoders, tmp_path):
  own = copies_of(folder, tmp_path / "own")
  write_manifest(own, ["3.mp4", "0.mp4"])
  clips = measure(own, SIZES, DURATIONS, FPS, decoders)
  frames = np.random.default_rng(1).integers(0, 255, (11, 16, 16, 3), np.uint8)
  write_mp4(own / "3.mp4", frames, FPS)  # Two of the four clips are gone.
  batches = make_batches(clips, decoders, frames=25)
  kept = video.read(own / "3.mp4", fps=FPS, num_frames=10, height=16, width=16)
  other = video.read(own / "0.mp4", fps=FPS, num_frames=5, height=16, width=16)
  for k in range(2):  # Also once the file is known to fail further on.
    assert set(clips_of([batches.batch(k)])) == {
      ((5, 16, 16, 3), clip.tobytes()) for clip in (kept[:5], kept[5:], other)
    }


def test_a_bucket_that_cannot_be_decoded_any_more_ends_the_reading(folder, decoders, tmp_path):
  own = copies_of(folder, tmp_path / "own")
  write_manifest(own, ["0.mp4", "1.mp4"])
  clips = measure(own, SIZES, DURATIONS, FPS, decoders)
  for name in ("0.mp4", "1.mp4"):
    (own / name).unlink()
  with pytest.raises(UserError, match="none of the 2 clips of 5 frames at 16x16"):
    make_batches(clips, decoders).batch(0)


def test_files_are_held_out_by_their_names_with_all_their_clips(clips, decoders):
  hashes = sorted(source_hash(item.id) for item in clips.files)
  fraction = source_hash("3.mp4") / 2.0**64 + 1e-9
  train, validation = clips.split(fraction)
  held_out = {item.id for item in clips.files if source_hash(item.id) < fraction * 2.0**64}
  assert 0 < len(held_out) < len(hashes)
  assert {n for found in validation.by_bucket.values() for n in found.files.tolist()} == {
    int(name.removesuffix(".mp4")) for name in held_out
  }
  assert train.num_clips + validation.num_clips == clips.num_clips
  shown = [clips_of(take(b := make_batches(c, decoders), b.per_epoch)) for c in (train, validation)]
  assert not set(shown[0]) & set(shown[1])
  everything, nothing = clips.split(0.0)
  assert (everything.num_clips, nothing.num_clips) == (13, 0)
  assert everything.digest() == clips.digest() != train.digest()


def test_a_split_with_nothing_to_train_on_is_refused(clips):
  with pytest.raises(UserError, match="none of the 13 clips is in the train split"):
    clips.split(0.999999)
  assert [part.num_clips for part in clips.split(1e-6)] == [13, 0]


def test_files_without_clips_are_refused_with_their_reasons(folder, decoders, tmp_path, capsys):
  own = copies_of(folder, tmp_path / "own")
  (own / "1.mp4").write_bytes(b"no video")
  write_manifest(own, ["0.mp4", "1.mp4", "2.mp4", "absent.mp4"])
  clips = measure(own, SIZES, (5,), FPS, decoders)
  assert clips.num_clips == 2
  assert [(refusal.file, refusal.line) for refusal in clips.refusals] == [
    ("absent.mp4", 4),
    ("1.mp4", 2),
  ]
  assert "1.mp4: " in capsys.readouterr().out
  with pytest.raises(UserError, match=r"No clip of .*: 3 named, 1 refused.\n.* is 13 frames"):
    measure(own, SIZES, (13,), FPS, decoders)


@pytest.mark.skipif(not STATM.exists(), reason="only Linux says how much memory a process holds")
def test_memory_does_not_grow_with_the_clips(decoders, tmp_path, monkeypatch):
  """200 clips of 17x64x64 are 42 MB of frames; 2 MiB are read ahead, in batches of 0.8 MB."""
  frames = np.broadcast_to(np.arange(85, dtype=np.uint8)[:, None, None, None], (85, 64, 64, 3))
  write_mp4(tmp_path / "0.mp4", frames, FPS)
  for copy in range(1, 40):
    os.link(tmp_path / "0.mp4", tmp_path / f"{copy}.mp4")
  write_manifest(tmp_path, [f"{copy}.mp4" for copy in range(40)])
  monkeypatch.setattr(clip_reading, "READ_AHEAD_BYTES", 2**21)
  clips = measure(tmp_path, ((64, 64),), (17,), FPS, decoders)
  batches = make_batches(clips, decoders, frames=68)
  assert clips.num_clips == 200
  held = []
  with closing(batches.iterate()) as iterator:
    for _ in islice(iterator, batches.per_epoch):
      held.append(int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
  assert max(held[10:]) - held[10] < 2**24


def test_a_batch_names_the_files_of_its_clips(folder, clips, decoders):
  batches = make_batches(clips, decoders)
  for k in range(batches.per_epoch):
    frames = batches.batch(k)
    names = batches.clips(k)
    assert len(names) == len(frames)
    for clip, name in zip(frames, names, strict=True):
      _, height, width, _ = clip.shape
      first = read(folder / name, fps=FPS, num_frames=1, height=height, width=width)
      is_first = np.array_equal(clip[0], first[0])
      assert is_first or name == "3.mp4"  # It gives several clips.


def test_folders_inside_and_links_are_followed_as_encode_follows_them(
  folder, decoders, tmp_path, capsys
):
  own, elsewhere = tmp_path / "own", tmp_path / "elsewhere"
  (own / "inside").mkdir(parents=True)
  elsewhere.mkdir()
  source = sorted(folder.glob("*.mp4"))[0]
  for place in (own, own / "inside", elsewhere):
    shutil.copy(source, place / "a.mp4")
    (place / "a.txt").write_text("a caption")
  os.symlink(elsewhere, own / "link")

  def files(**choice):
    return [item.name for item in measure(own, SIZES, DURATIONS, FPS, decoders, **choice).files]

  assert files() == ["a.mp4", "inside/a.mp4"]
  assert files(subfolders=False) == ["a.mp4"]
  assert files(allow_links=True) == ["a.mp4", "inside/a.mp4", "link/a.mp4"]
