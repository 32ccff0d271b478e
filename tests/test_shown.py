"""What an epoch shows of each clip: a caption or none, one of its images, in whole patches."""

import ml_dtypes
import numpy as np
import pytest
from drawn_dataset import assert_equal, draw_example, make_rows

from cogvideox_jax.data import packing
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.shards import ShardWriter
from cogvideox_jax.types import Caption

CLIPS, DRAWS = 60, 3


def draw_captioned(number):
  """A clip of 1 to 4 captions, the k-th of which has states of k; its n-th image holds n."""
  example = draw_example(number)
  captions = [Caption(str(k), np.full_like(example.text, k)) for k in range(1 + number % 4)]
  image = np.arange(DRAWS, dtype=np.float32).reshape(-1, 1, 1, 1, 1) + np.zeros(
    (DRAWS, 2, *example.mean.shape[1:]), np.float32
  )
  return example._replace(**captions[0]._asdict(), others=tuple(captions[1:]), image=image)


def write(directory, numbers):
  writer = ShardWriter(directory, 1, "test")
  writer.write_shard(0, [draw_captioned(number) for number in numbers])
  writer.finalize()
  return Dataset(directory)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  return write(tmp_path_factory.mktemp("captioned"), range(CLIPS))


def shown(rows, epoch):
  """The caption of every clip in an epoch, and the image of each row."""
  captions, images = np.full(CLIPS, -1), []
  for number in range(epoch * rows.per_epoch, (epoch + 1) * rows.per_epoch):
    row = rows.read(number)
    clips = rows[number].clips
    captions[clips] = row.text[0, : len(clips), 0, 0]
    images.append(row.image)
  return captions, images


def test_an_epoch_shows_one_of_the_captions_of_each_clip_all_equally_often(dataset):
  rows = make_rows(dataset, drop_rate=0.0)
  epochs = np.array([shown(rows, epoch)[0] for epoch in range(30)])
  counts = 1 + np.arange(CLIPS) % 4
  assert (epochs >= 0).all() and (epochs < counts).all()
  for count in (2, 3, 4):
    seen = np.bincount(epochs[:, counts == count].ravel(), minlength=count)
    total = seen.sum()
    assert (np.abs(seen - total / count) < 4.5 * np.sqrt(total / count)).all()
  varied = epochs[:, counts == 4]
  assert (varied.min(0) != varied.max(0)).all()  # Not always the same one of a clip.
  assert (varied[0] != varied[1]).any()


def test_which_caption_follows_from_seed_epoch_and_clip_alone(dataset):
  one = make_rows(dataset, drop_rate=0.0)
  again = make_rows(dataset, drop_rate=0.0, row_tokens=240, max_clips=9)
  other = make_rows(dataset, drop_rate=0.0, seed=8)
  np.testing.assert_array_equal(shown(one, 5)[0], shown(again, 5)[0])
  assert (shown(one, 5)[0] != shown(other, 5)[0]).any()
  held_out = make_rows(dataset, validation_fraction=1.0, split="validation")
  np.testing.assert_array_equal(shown(held_out, 0)[0], shown(held_out, 3)[0])


def test_epochs_take_turns_of_the_images(dataset):
  rows = make_rows(dataset, with_images=True)
  for epoch in range(5):
    for row in shown(rows, epoch)[1]:
      assert set(np.unique(row)) <= {0, epoch % DRAWS}
      assert row.any() == bool(epoch % DRAWS)
  held_out = make_rows(dataset, validation_fraction=1.0, split="validation", with_images=True)
  assert not any(row.any() for row in shown(held_out, 2)[1])  # Always the first.


def test_rows_for_models_without_images_carry_none_and_are_else_the_same(tmp_path):
  moving = write(tmp_path, [number for number in range(CLIPS) if number % 3])
  with_images, without = make_rows(moving, with_images=True), make_rows(moving)
  row = without.read(3)
  assert row.image is None and row.extra is None
  assert_equal(with_images.read(3)._replace(image=None), row)


def test_a_dropped_caption_does_not_change_the_types_of_a_row(dataset):
  empty = np.full((8, 4), 0.5, np.float32)
  for drop in ("zeros", empty):
    rows = make_rows(dataset, drop=drop, drop_rate=0.5)
    types = {tuple(part.dtype for part in rows.read(k) if part is not None) for k in range(20)}
    assert len(types) == 1
    assert rows.read(0).text.dtype == ml_dtypes.bfloat16


def test_clips_of_odd_latent_length_fill_patches_of_two_frames(dataset):
  rows = make_rows(dataset, patch=(2, 2, 2), with_images=True)
  odd = [draw_captioned(number) for number in range(CLIPS)]
  for number, length in enumerate(rows.lengths):
    f, h, w = odd[number].mean.shape[:3]
    assert length == 8 + (f + 1) // 2 * (h // 2) * (w // 2)
  for number in range(rows.per_epoch):
    row = rows.read(number)
    clips = rows[number].clips
    np.testing.assert_array_equal(row.extra[0, 1 : 1 + len(clips)], 1)  # All have 1, 3 or 5.
    assert (row.segment_ids > 0).sum() == rows.lengths[clips].sum()


@pytest.mark.parametrize("patch", [(2, 2, 2), (3, 2, 2)])
def test_packing_an_odd_clip_is_packing_it_with_its_first_latent_repeated_by_hand(patch):
  rng = np.random.default_rng(0)
  for frames in (1, 2, 5):
    example = draw_captioned(0)
    mean, logvar = rng.normal(size=(2, frames, 4, 6, 2)).astype(np.float32)
    image = rng.normal(size=(1, 2, 4, 6, 2)).astype(np.float32)
    example = example._replace(mean=mean, logvar=logvar, image=image)
    extra = -frames % patch[0]
    by_hand = example._replace(
      mean=np.concatenate([mean[:1]] * extra + [mean]),
      logvar=np.concatenate([logvar[:1]] * extra + [logvar]),
    )
    ours, theirs = (
      packing.pack([one, one], patch=patch, row_tokens=64, max_clips=2)
      for one in (example, by_hand)
    )
    assert ours.extra.tolist() == [[0, extra, extra]] and not theirs.extra.any()
    assert_equal(ours._replace(extra=None), theirs._replace(extra=None))
