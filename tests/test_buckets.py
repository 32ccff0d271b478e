"""Buckets: the models can take each, and a clip gets the one that crops and shortens it least."""

import contextlib
import itertools

import pytest
from typed_config import typed

from cogvideox_jax.config import checks
from cogvideox_jax.data import buckets
from cogvideox_jax.data.buckets import Bucket, assign, check, cut
from cogvideox_jax.data.video import VideoError, VideoInfo
from cogvideox_jax.errors import UserError
from configs import base

SIZES = ((64, 64), (48, 80), (80, 48))
DURATIONS = (1, 9, 17)


def clip(num_frames: int, height: int, width: int, fps: float = 8.0) -> VideoInfo:
  return VideoInfo(num_frames, height, width, fps, num_frames / fps)


def image(height: int, width: int) -> VideoInfo:
  return VideoInfo(1, height, width, 0.0, 0.0)


@pytest.mark.parametrize(
  ("sizes", "durations", "words"),
  [
    (SIZES, (1, 16), ("16 frames", "13 or 17")),
    (SIZES, (0,), ("0 frames", "1 or 5")),
    (SIZES, (-3,), ("-3 frames", "1 or 5")),
    (((60, 64),), DURATIONS, ("60x64", "multiple of 16", "64x64")),
    (((64, 65),), DURATIONS, ("64x65", "64x64")),
    (((0, 64),), DURATIONS, ("0x64", "16x64")),
    ((), DURATIONS, ("at least one size",)),
    (SIZES, (), ("at least one size and one duration",)),
  ],
)
def test_a_bucket_that_the_models_cannot_take_is_named_with_the_nearest_ones(
  sizes, durations, words
):
  with pytest.raises(UserError) as caught:
    check(sizes, durations, multiple_of=16)
  assert all(word in str(caught.value) for word in words), caught.value


def test_good_buckets_pass():
  check(SIZES, DURATIONS, multiple_of=16)
  check(((480, 720), (768, 1360)), (1, 49, 81, 161), multiple_of=16)


@pytest.mark.parametrize(
  ("height", "width", "size"),
  [
    (1080, 1920, (48, 80)),
    (1920, 1080, (80, 48)),
    (480, 480, (64, 64)),
    (480, 600, (64, 64)),  # 1.25: nearer to 1 than to 1.67, by ratio.
    (480, 640, (48, 80)),  # 1.33 is past their geometric mean, 1.29.
    (640, 480, (80, 48)),
    (48, 8000, (48, 80)),
  ],
)
def test_a_clip_goes_to_the_nearest_shape(height, width, size):
  for order in itertools.permutations(SIZES):
    assert assign(clip(17, height, width), order, DURATIONS, 8.0) == Bucket(17, *size)


def test_of_equal_shapes_the_nearest_in_size_is_taken():
  sizes = ((256, 384), (512, 768), (1024, 1536))
  assert assign(image(480, 720), sizes, (1,), 8.0) == Bucket(1, 512, 768)
  assert assign(image(200, 300), sizes, (1,), 8.0) == Bucket(1, 256, 384)
  assert assign(image(4000, 6000), sizes, (1,), 8.0) == Bucket(1, 1024, 1536)


@pytest.mark.parametrize(
  ("num_frames", "fps", "taken"),
  [(17, 8.0, 17), (16, 8.0, 9), (8, 8.0, 1), (2, 8.0, 1), (48, 24.0, 17), (60, 24.0, 17)],
)
def test_a_clip_keeps_the_longest_duration_it_has(num_frames, fps, taken):
  """48 frames at 24 fps are 2 s, that is 17 frames at 8 fps: the last is at 2.0, or nearly."""
  info = clip(num_frames, 64, 64, fps)
  assert assign(info, SIZES, DURATIONS, 8.0) == Bucket(taken, 64, 64)
  assert assign(info, SIZES, DURATIONS[::-1], 8.0) == Bucket(taken, 64, 64)


def test_what_is_shorter_than_every_duration_has_no_bucket():
  for info in (image(64, 64), clip(8, 64, 64)):
    with pytest.raises(VideoError, match="s is shorter than 9 frames at 8 frames a second"):
      assign(info, SIZES, (9, 17), 8.0)
  assert assign(clip(9, 64, 64), SIZES, (9, 17), 8.0) == Bucket(9, 64, 64)


def test_a_video_is_enlarged_by_half_at_most():
  stages = {256: ((256, 384), (256, 256)), 512: ((512, 768), (512, 512)), 768: ((768, 1152),)}
  taken = {}
  for short_side, sizes in stages.items():
    with contextlib.suppress(VideoError):
      taken[short_side] = assign(clip(17, 480, 720), sizes, DURATIONS, 8.0)
  assert taken == {256: (17, 256, 384), 512: (17, 512, 768)}
  with pytest.raises(VideoError, match=r"480x720 .* enlarged 1\.6 times to 768x1152; 1\.5 is"):
    assign(clip(17, 480, 720), stages[768], DURATIONS, 8.0)


def test_a_shape_farther_off_is_taken_before_a_size_that_is_too_large():
  sizes = ((256, 384), (1024, 1024))
  assert assign(image(300, 300), sizes, (1,), 8.0) == Bucket(1, 256, 384)


@pytest.mark.parametrize(
  ("num_frames", "durations", "lengths"),
  [
    (60, (1, 9, 17, 49), [49, 9]),
    (110, (1, 9, 17, 49), [49, 49, 9]),
    (97, (1, 33, 49), [49, 33]),
    (34, (17, 1), [17, 17]),
    (48, (1, 9, 17, 33, 49), [9, 9, 9, 9, 9]),  # 33 and 9 would leave six frames over.
    (26, (1, 9, 17), [17, 9]),  # Of the cuts that leave none over, that of the fewest clips is it.
    (97, (1, 9, 17, 33, 49), [49, 9, 9, 9, 9, 9]),
    (31, (5, 13), [13, 13, 5]),
    (44, (9, 33), [33, 9]),
    (66, (1, 33, 49), [33, 33]),  # 49 alone would leave a quarter over.
    (98, (49, 81), [49, 49]),
    (147, (49, 81), [49, 49, 49]),
    (179, (49, 81), [81, 81]),
    (81, (1, 9, 17, 33, 49), [49, 9, 9, 9]),  # Five frames are not worth a clip of 49.
    (24, (1, 9, 17), [17]),  # Nor is one.
    (40, (1, 9, 17, 33, 49), [9, 9, 9, 9]),
    (8, (1, 9), [1]),  # Less than a clip is worth a still, but
    (16, (1, 9), [9]),  # more than a clip is worth no stills.
    (1, (1, 9), [1]),
  ],
)
def test_a_long_video_is_cut_into_clips_that_share_no_frame(num_frames, durations, lengths):
  windows = cut(clip(num_frames, 64, 64), SIZES, durations, 8.0)
  assert [window.num_frames for window in windows] == lengths
  assert [window.start for window in windows] == [0, *itertools.accumulate(lengths)][:-1]
  assert {window[2:] for window in windows} == {(64, 64)}


@pytest.mark.parametrize("durations", [(1, 9, 17, 33, 49), (1, 33, 49), (49, 81), (5, 13), (17,)])
def test_no_cut_leaves_a_tenth_fewer_frames_over_and_short_videos_lose_the_fewest(durations):
  moving = [frames for frames in durations if frames > 1]
  reached = {0}  # Sums of clips.
  for frames in range(1, 200):
    reached |= {frames} if any(frames - length in reached for length in moving) else set()
    if frames < min(moving):
      continue
    windows = cut(clip(frames, 64, 64), SIZES, durations, 8.0)
    used, most = sum(window.num_frames for window in windows), max(reached)
    assert most - used < buckets.WORTH_A_CLIP * frames
    if frames < max(moving):
      assert used == most


def test_the_published_stages_keep_every_common_aspect():
  config = typed(base.get_config())
  checks.check(config, "")
  for stage, short_side in zip(config.stages.values(), (256, 480, 768, 768), strict=True):
    check(stage.sizes, stage.durations, multiple_of=16)
    for height, width in ((1080, 1920), (1920, 1080), (960, 1280), (1000, 1500), (900, 900)):
      bucket = assign(clip(49, height, width), stage.sizes, stage.durations, 8.0)
      assert min(bucket.height, bucket.width) == short_side
      assert (bucket.width / bucket.height) / (width / height) == pytest.approx(1, abs=0.03)
