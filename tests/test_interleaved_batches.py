"""Batches of images among those of videos, and clips at several frame rates."""

from contextlib import closing
from itertools import islice

import numpy as np
import pytest

from cogvideox_jax.data.clip_batches import ClipBatches
from cogvideox_jax.data.decoding import Decoders
from cogvideox_jax.data.interleaved_batches import InterleavedBatches
from cogvideox_jax.data.measured_clips import measure
from cogvideox_jax.data.mp4 import write_mp4

SIZES = ((16, 16),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Four videos at 16 frames a second, and two at 8; each has a brightness that rises in time."""
  folder = tmp_path_factory.mktemp("clips")
  for number, fps in enumerate((16.0, 16.0, 16.0, 16.0, 8.0, 8.0)):
    levels = np.arange(int(2 * fps) + 1) * 120 // (2 * fps) + 20 * number
    frames = np.broadcast_to(levels[:, None, None, None], (len(levels), 16, 16, 3))
    write_mp4(folder / f"{number}.mp4", frames.astype(np.uint8), fps)
    (folder / f"{number}.txt").write_text("brighter")
  return folder


@pytest.fixture(scope="module")
def decoders():
  with Decoders(1) as decoders:
    yield decoders


def interleaved(folder, decoders, share):
  clips = measure(folder, SIZES, (5,), 8.0, decoders)

  def plan(chosen):
    return ClipBatches(chosen, decoders, frames=10, seed=0)

  return InterleavedBatches(plan(clips.stills()), plan(clips.videos()), share)


def test_images_have_their_share_of_the_batches_over_any_stretch(folder, decoders):
  batches = interleaved(folder, decoders, 0.3)
  are_images = [batches.sizes_of(k).bucket.num_frames == 1 for k in range(200)]
  for start in range(100):
    for length in (10, 37, 100):
      share = 0.3 * length
      assert abs(sum(are_images[start : start + length]) - share) <= 1
  assert sum(are_images) == 60


def test_an_epoch_has_every_video_once_beside_its_images(folder, decoders):
  batches = interleaved(folder, decoders, 0.25)
  epochs = [batches.epoch(k) for k in range(5 * batches.per_epoch)]
  assert epochs == sorted(epochs)
  first = [k for k in range(len(epochs)) if epochs[k] == 0]
  videos = [k for k in first if batches.sizes_of(k).bucket.num_frames > 1]
  names = [name for k in videos for name in batches.clips(k)]
  assert {name: names.count(name) for name in names} == {f"{n}.mp4": 3 for n in range(6)}


def test_batches_follow_from_their_number_wherever_reading_begins(folder, decoders):
  batches = interleaved(folder, decoders, 0.5)
  with closing(batches.iterate()) as iterator:
    whole = list(islice(iterator, 8))
  for start in (3, 4):
    with closing(batches.iterate(start)) as iterator:
      for expected, found in zip(whole[start:], iterator, strict=False):
        np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(batches.batch(5), whole[5])


def test_without_images_in_the_data_the_first_frames_of_clips_are_images(folder, decoders):
  clips = measure(folder, SIZES, (5,), 8.0, decoders)
  stills = clips.stills()
  assert stills.num_clips == clips.num_clips
  (bucket,) = stills.by_bucket
  assert bucket.num_frames == 1
  with_images = measure(folder, SIZES, (1, 5), 8.0, decoders)
  assert with_images.stills().num_clips == with_images.num_clips  # None is an image by itself.


def test_clips_are_read_at_all_rates_of_their_file_and_begin_at_the_same_instant(folder, decoders):
  clips = measure(folder, SIZES, (5,), 8.0, decoders, more_fps=(16.0, 30.0))
  assert clips.rates == {n: (8.0, 16.0) if n < 4 else (8.0,) for n in range(6)}
  plain = measure(folder, SIZES, (5,), 8.0, decoders)
  assert clips.digest() != plain.digest()
  assert plain.rates == {}
  batches = ClipBatches(clips, decoders, frames=5, seed=0)
  rates = {n: [] for n in range(6)}
  for k in range(6 * batches.per_epoch):
    (name,) = batches.clips(k)
    number, frames = int(name[0]), batches.batch(k)[0]
    levels = frames.mean(axis=(1, 2, 3))
    # The brightness rises by 60 a second; at 8 frames a second a frame is 7.5 brighter.
    rate = 4 / ((levels[-1] - levels[0]) / 60)
    rates[number].append(min((8, 16), key=lambda near: abs(near - rate)))
    assert abs(rates[number][-1] - rate) < 1.5
    start = (levels[0] - 20 * number) / 60  # Seconds.
    assert abs(start / 0.625 - round(start / 0.625)) < 0.1  # Every 5 frames at 8 a second.
  assert {rate for n in range(4) for rate in rates[n]} == {8, 16}
  assert all(8 in rates[n] and 16 in rates[n] for n in range(4))
  share = np.mean([rate == 16 for n in range(4) for rate in rates[n]])
  assert 0.3 < share < 0.7
  assert {rate for n in (4, 5) for rate in rates[n]} == {8}
