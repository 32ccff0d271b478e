"""Files to Examples: the frozen VAE and text encoder over the data, once.

The manifest's items are cut into shards, in order; a shard is written whole or not at all, by one
host. So hosts never wait for one another, and a killed run loses at most the shard it was at.

Three things go on at once: processes decode the next files, the devices encode a batch of clips of
one bucket, and a thread writes the batch before.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from itertools import repeat
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Float32, UInt8
from tqdm import tqdm

from cogvideox_jax import hosts
from cogvideox_jax.config.checks import check
from cogvideox_jax.config.read import to_json
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.data import buckets
from cogvideox_jax.data.buckets import Bucket
from cogvideox_jax.data.clips import Clip, cut_clips
from cogvideox_jax.data.decoding import Decoders, File, Piece
from cogvideox_jax.data.files import disk_errors, write_atomically
from cogvideox_jax.data.manifest import Item, Refusal, read_manifest
from cogvideox_jax.data.noising import ImageNoise, noised_copies
from cogvideox_jax.data.records import storage_fault
from cogvideox_jax.data.shards import Counts, OpenShard, ShardWriter, identity
from cogvideox_jax.data.video import VideoError, VideoInfo, Window
from cogvideox_jax.frozen_networks import FrozenNetworks, fill
from cogvideox_jax.interrupts import Interrupts
from cogvideox_jax.types import Caption, Example

SHARD_ITEMS = 128  # What a killed run does again, at most; of 49x480x720, a shard is 0.8 GB.
SHARD_BYTES = 2**28  # Of files: long videos, which give many clips each, fill a shard sooner.
WRITES_BEHIND = 2  # Batches that wait to be written; each holds memory of the devices.
Frames = UInt8[np.ndarray, "F H W 3"]
States = Float[np.ndarray, "l t"]
Moments = tuple[Float[Array, "b f h w c"], Float[Array, "b f h w c"]]
Images = Float[Array, "b draws 2 h w c"] | None

WORKERS = min(os.cpu_count() or 1, 16)  # Decode more than the devices of a host encode.


def encode(
  config: TrainConfig,
  source: epath.PathLike,
  output: epath.PathLike,
  model: str,
  *,
  workers: int = WORKERS,
) -> Counts:
  """Encodes the clips of a manifest or folder into OUTPUT/STAGE, for each stage of the config.

  A stage that reads the clips of another (its `data`) has none of its own.

  A file is decoded once for all stages, and what cannot be used of it gets its line in
  OUTPUT/quarantine.jsonl. Called again, it finishes what is missing. Every host of a job calls it
  (see hosts.py): each writes a share of the shards, and all return when everything is written.

  Args:
    model: a shipped name or a model folder, whose VAE, text encoder and tokenizer are used.
    workers: processes that decode; the result does not depend on them.

  Returns:
    How many clips were encoded, over all stages, and how many lines the quarantine has.

  Raises:
    UserError: the config, the source, the model or the output cannot be used; before any work.
  """
  check(config, model)
  items, refusals = read_manifest(source)
  networks, output = FrozenNetworks(open_model(model), config), epath.Path(output)
  runs = _runs(items)
  own = [name for name, stage in config.stages.items() if not stage.data]
  stages = [_Stage(config, name, output, runs, networks.digest) for name in own]
  lacking = hosts.agree([any(stage.lacks(run) for stage in stages) for run in range(len(runs))])
  missing = [run for run, lacks in enumerate(lacking) if lacks]
  mine = missing[jax.process_index() :: jax.process_count()]
  shards = [_Shard(run, runs[run], [stage for stage in stages if stage.lacks(run)]) for run in mine]
  done = len(items) - sum(len(runs[run]) for run in missing)
  total = done + sum(len(shard.items) for shard in shards)
  with tqdm(total=total, initial=done, desc="Encoding", unit="file") as bar:
    _encode_shards(shards, networks, config, workers, bar)
  return _finish(stages, refusals, output, config)


def _runs(items: Sequence[Item]) -> list[list[Item]]:
  """The items of each shard."""
  runs: list[list[Item]] = [[]]
  size = 0
  for item in items:
    length = item.file.stat().length
    if runs[-1] and (len(runs[-1]) == SHARD_ITEMS or size + length > SHARD_BYTES):
      runs.append([])
      size = 0
    runs[-1].append(item)
    size += length
  return runs


class StageClip(NamedTuple):
  """A clip of a stage's dataset."""

  stage: str
  clip: Clip


class _Stage:
  """A dataset in the making."""

  def __init__(
    self, config: TrainConfig, name: str, output: epath.Path, runs: list[list[Item]], model: str
  ):
    self.name, self._fps = name, config.data.fps
    self._sizes, self._durations = config.stages[name].sizes, config.stages[name].durations
    made_from = identity(
      {
        "items": [
          [[item.id, item.name, item.score, *item.captions] for item in run] for run in runs
        ],
        "model": model,
        "text_length": config.model.text_length,
        "buckets": [self._sizes, self._durations, self._fps, buckets.MAX_ENLARGEMENT],
        "images": _image_noise(config),
      }
    )
    self.writer = ShardWriter(output / name, len(runs), made_from)
    self._pending = set(self.writer.pending())

  def lacks(self, shard: int) -> bool:
    """Whether it had to be written when this process began."""
    return shard in self._pending

  def cut(self, item: Item, info: VideoInfo) -> list[StageClip]:
    """The clips of a file; VideoError if there are none for this stage."""
    clips = cut_clips(item, info, self._sizes, self._durations, self._fps)
    return [StageClip(self.name, clip) for clip in clips]


class _Shard:
  """A run of items, on its way into the stages that lack it."""

  def __init__(self, number: int, items: list[Item], stages: list[_Stage]):
    self.items = items
    self._number, self._stages = number, stages
    self._planned: dict[str, list[StageClip]] = {}  # By the item's id.
    self._refusals: dict[str, set[Refusal]] = {stage.name: set() for stage in stages}

  @cached_property
  def _outputs(self) -> dict[str, OpenShard]:
    return {stage.name: stage.writer.open_shard(self._number) for stage in self._stages}

  def files(self, fps: float) -> Iterator[File]:
    return (File(item.file, fps, partial(self._plan, item)) for item in self.items)

  def clips(
    self, decoded: Iterator[Iterator[Piece]], bar: tqdm
  ) -> Iterator[tuple[StageClip, Frames]]:
    """What the decoders make of the shard's files."""
    for item, pieces in zip(self.items, decoded, strict=False):
      given = 0
      try:
        for number, frames in pieces:
          yield self._planned[item.id][number], frames
          given += 1
      except VideoError as error:
        kept = f", after {given} clips that are kept" if given else ""
        self._refuse(item, f"{error}{kept}", self._refusals)
      bar.update()

  def write(
    self, clips: Sequence[StageClip], moments: Moments, images: Images, texts: dict[str, States]
  ) -> None:
    """Writes a batch, once the devices have made it."""
    each = repeat(None) if images is None else np.asarray(images)
    for (stage, clip), mean, logvar, image in zip(
      clips, *map(np.asarray, moments), each, strict=False
    ):
      first, *others = (Caption(caption, texts[caption]) for caption in clip.item.captions)
      example = Example(
        mean=mean,
        logvar=logvar,
        **first._asdict(),
        source=clip.source,
        **clip.bucket._asdict(),
        fps=clip.fps,
        score=clip.item.score,
        others=tuple(others),
        image=image,
      )
      if fault := storage_fault(example):
        self._refuse(clip.item, f"stage {stage}, clip {clip.source}: {fault}", [stage])
      else:
        self._outputs[stage].write(example)

  def close(self) -> None:
    for name, output in self._outputs.items():
      output.close(refusal._asdict() for refusal in sorted(self._refusals[name], key=_by_line))

  def _plan(self, item: Item, info: VideoInfo) -> list[Window]:
    """What the stages want of a file. Runs in a decoder's thread, before the file's clips come."""
    wanted: list[StageClip] = []
    for stage in self._stages:
      try:
        wanted += stage.cut(item, info)
      except VideoError as error:
        self._refuse(item, f"stage {stage.name}: {error}", [stage.name])
    self._planned[item.id] = wanted
    return [clip.window for _, clip in wanted]

  def _refuse(self, item: Item, reason: str, stages: Iterable[str]) -> None:
    for name in stages:
      self._refusals[name].add(Refusal(item.name, item.line, reason))


class _Background:
  """Does one thing after another in another thread, and lets it fall behind by a few only."""

  def __init__(self):
    self._thread = ThreadPoolExecutor(1, "write")
    self._waiting: deque[Future] = deque()

  def __enter__(self) -> "_Background":
    return self

  def __exit__(self, fault: type[BaseException] | None, *_: object) -> None:
    try:
      if not fault:
        self._wait(0)
    finally:
      self._thread.shutdown(cancel_futures=True)

  def do(self, function: Callable[..., None], *args: Any) -> None:
    """Raises what an earlier call raised."""
    self._waiting.append(self._thread.submit(function, *args))
    self._wait(WRITES_BEHIND)

  def _wait(self, behind: int) -> None:
    while len(self._waiting) > behind:
      self._waiting.popleft().result()


def _encode_shards(
  shards: Sequence[_Shard], networks: FrozenNetworks, config: TrainConfig, workers: int, bar: tqdm
) -> None:
  files = (file for shard in shards for file in shard.files(config.data.fps))
  noise = _image_noise(config)
  interrupts = Interrupts("Stopping after this clip.")
  with interrupts, Decoders(workers) as decoders, _Background() as background:
    decoded = decoders.decode(files)
    for shard in shards:
      texts = _texts(shard.items, networks)
      for batch in _batches(interrupts.until(shard.clips(decoded, bar)), networks):
        clips, frames = zip(*batch, strict=True)
        size = networks.batch_size(clips[0].clip.bucket)
        moments = networks.moments(fill(np.stack(frames), size))
        images = networks.images(fill(_copies(clips, frames, noise), size)) if noise else None
        background.do(shard.write, clips, moments, images, texts)
      background.do(shard.close)


def _image_noise(config: TrainConfig) -> ImageNoise | None:
  """Of first frames; None if the config's model sees no image."""
  if not config.model.takes_image:
    return None
  image = config.image
  return ImageNoise(image.draws, image.log_sigma_mean, image.log_sigma_std, config.seed)


def _copies(
  clips: Sequence[StageClip], frames: Sequence[Frames], noise: ImageNoise
) -> Float32[np.ndarray, "b draws H W 3"]:
  """Noised first frames of a batch of clips."""
  named = zip(clips, frames, strict=True)
  return np.stack([noised_copies(video[0], clip.source, noise) for (_, clip), video in named])


def _texts(items: Sequence[Item], networks: FrozenNetworks) -> dict[str, States]:
  """The states of every caption of the items."""
  captions = list(dict.fromkeys(caption for item in items for caption in item.captions))
  return dict(zip(captions, networks.text(captions), strict=True)) if captions else {}


def _batches(
  clips: Iterator[tuple[StageClip, Frames]], networks: FrozenNetworks
) -> Iterator[list[tuple[StageClip, Frames]]]:
  """Clips of one stage and bucket together, as many as the networks take; fewer at the end."""
  waiting: dict[tuple[str, Bucket], list[tuple[StageClip, Frames]]] = {}
  for staged, frames in clips:
    key = staged.stage, staged.clip.bucket
    waiting.setdefault(key, []).append((staged, frames))
    if len(waiting[key]) == networks.batch_size(staged.clip.bucket):
      yield waiting.pop(key)
  for key in sorted(waiting):
    yield waiting[key]


def _finish(
  stages: Sequence[_Stage], refusals: list[Refusal], output: epath.Path, config: TrainConfig
) -> Counts:
  """Waits until the other hosts have written their shards; the first one then adds the index.

  And the config, for `inspect`, which need not be told what the dataset is for.
  """
  for stage in stages:
    lacking = stage.writer.pending()
    while lacking:
      time.sleep(1)
      lacking = stage.writer.pending(lacking)
  lines = {*refusals, *(Refusal(**line) for stage in stages for line in stage.writer.refusals())}
  if jax.process_index() == 0:
    for stage in stages:
      stage.writer.finalize()
    text = "".join(json.dumps(line._asdict()) + "\n" for line in sorted(lines, key=_by_line))
    with disk_errors(output):
      write_atomically(output / "quarantine.jsonl", text.encode())
      write_atomically(output / "config.json", to_json(config).encode())
  hosts.wait("encoded")
  return Counts(sum(stage.writer.counts().clips for stage in stages), len(lines))


def _by_line(refusal: Refusal) -> tuple[int, str, str]:
  return refusal.line, refusal.file, refusal.reason
