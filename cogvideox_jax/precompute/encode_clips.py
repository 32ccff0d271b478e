"""Encodes clips and captions once, before training: from files to Examples in shards.

The manifest's items are cut into shards, in order. One host writes a shard, whole or not at all. So
hosts never wait for one another, and a killed run loses at most the shard that it was writing.

Three things run at once: processes decode the next files, the devices encode a batch of clips of
one bucket, and a thread writes the batches before it.
"""

import json
import os
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from etils import epath
from jaxtyping import Float32
from tqdm import tqdm

from cogvideox_jax import hosts
from cogvideox_jax.config.checks import check
from cogvideox_jax.config.read import to_dict
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.conversion import component_digests
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.data.buckets import Bucket
from cogvideox_jax.data.decoding import Decoders
from cogvideox_jax.data.files import disk_errors, write_atomically
from cogvideox_jax.data.items import Item, Refusal
from cogvideox_jax.data.manifest import read_manifest
from cogvideox_jax.data.noising import ImageNoise, noised_copies
from cogvideox_jax.data.shards import Counts, check_networks
from cogvideox_jax.errors import UserError
from cogvideox_jax.frozen_networks import FrozenNetworks, fill
from cogvideox_jax.interrupts import Interrupts
from cogvideox_jax.precompute.background import Background
from cogvideox_jax.precompute.stage_shards import (
  Frames,
  Shard,
  Stage,
  StageClip,
  States,
  by_line,
  check_begun,
  image_noise,
)
from cogvideox_jax.version import __version__

SHARD_ITEMS = 128  # A killed run repeats at most these items. A shard of 49x480x720 has 0.8 GB.
SHARD_BYTES = 2**28  # Bytes of a shard's files: long videos give many clips each.
WRITES_BEHIND = 2  # Batches that wait to be written; each holds memory of the devices.
REASONS = 4  # The most reasons that a message lists.
WORKERS = min(os.cpu_count() or 1, 16)  # They decode faster than the devices of a host encode.


def encode(
  config: TrainConfig,
  source: epath.PathLike,
  output: epath.PathLike,
  model: str,
  *,
  workers: int = WORKERS,
  subfolders: bool = True,
  allow_links: bool = False,
) -> Counts:
  """Encodes the clips of a manifest or folder into OUTPUT/STAGE, for each stage of the config.

  A stage that reads the clips of another (its `data`) gets no dataset. A file is decoded once for
  all stages. What cannot be used of it gets a line in OUTPUT/quarantine.jsonl. A second call
  finishes what is missing, and writes anew what is damaged. Every host of a job calls this (see
  hosts.py): each writes a share of the shards, and all return when everything is written.

  Args:
    model: a shipped name or a model folder, whose VAE, text encoder and tokenizer are used.
    workers: processes that decode; the result does not depend on them.
    subfolders: whether folders inside a folder of clips are searched.
    allow_links: whether links may lead out of the manifest's folder.

  Returns:
    How many clips were encoded, over all stages, and how many lines the quarantine has.

  Raises:
    UserError: the config, the source, the model or the output cannot be used; before any work. Or
      after it, not one clip could be encoded.
  """
  check(config, model)
  items, refusals, notes = read_manifest(source, subfolders=subfolders, allow_links=allow_links)
  for note in notes if hosts.is_first() else ():
    print(note)
  folder, output = open_model(model), epath.Path(output)
  shard_items = _cut_into_shards(items)
  names = [name for name, stage in config.stages.items() if not stage.data]
  for name in names:
    check_begun(config, name, output, shard_items)
  encoders = component_digests.describe(folder, model, config.text.drop, config.data.fps)
  for name in names:
    check_networks(output / name, encoders)
  networks = FrozenNetworks(folder, config)
  stages = [Stage(config, name, output, shard_items, networks.digest, encoders) for name in names]
  numbers = range(len(shard_items))
  _discard_damaged(stages, numbers[jax.process_index() :: jax.process_count()])
  lacking = hosts.agree([any(stage.lacks(number) for stage in stages) for number in numbers])
  missing = [number for number, lacks in enumerate(lacking) if lacks]
  mine = missing[jax.process_index() :: jax.process_count()]
  shards = [
    Shard(number, shard_items[number], [stage for stage in stages if stage.lacks(number)])
    for number in mine
  ]
  done = len(items) - sum(len(shard_items[number]) for number in missing)
  total = done + sum(len(shard.items) for shard in shards)
  with tqdm(total=total, initial=done, desc="Encoding", unit="file") as bar:
    _encode_shards(shards, networks, config, workers, bar)
  return _finish(stages, refusals, output, config)


def _cut_into_shards(items: Sequence[Item]) -> list[list[Item]]:
  """Returns the items of each shard."""
  shards: list[list[Item]] = [[]]
  size = 0
  for item in items:
    length = item.file.stat().length
    if shards[-1] and (len(shards[-1]) == SHARD_ITEMS or size + length > SHARD_BYTES):
      shards.append([])
      size = 0
    shards[-1].append(item)
    size += length
  return shards


def _discard_damaged(stages: Sequence[Stage], numbers: Sequence[int]) -> None:
  """Deletes the shards that are damaged, so that they are written again. Reads all of them."""
  written = [
    (stage, number)
    for stage in stages
    for number in sorted(set(numbers) - set(stage.writer.pending(numbers)))
  ]
  for stage, number in tqdm(written, "Checking", unit="shard", leave=False, disable=not written):
    if stage.writer.discard_damaged(number):
      tqdm.write(f"{stage.writer.directory}: shard {number} is damaged and is encoded again")
  hosts.wait("checked")


def _encode_shards(
  shards: Sequence[Shard], networks: FrozenNetworks, config: TrainConfig, workers: int, bar: tqdm
) -> None:
  files = (file for shard in shards for file in shard.files(config.data.fps))
  noise = image_noise(config)
  interrupts = Interrupts("Stopping after this clip.")
  with (
    interrupts,
    Decoders(workers, config.data.limits) as decoders,
    Background(WRITES_BEHIND) as background,
  ):
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


def _copies(
  clips: Sequence[StageClip], frames: Sequence[Frames], noise: ImageNoise
) -> Float32[np.ndarray, "b draws H W 3"]:
  """Returns noised copies of the first frames of a batch of clips."""
  named = zip(clips, frames, strict=True)
  return np.stack([noised_copies(video[0], clip.source, noise) for (_, clip), video in named])


def _texts(items: Sequence[Item], networks: FrozenNetworks) -> dict[str, States]:
  """Returns the text states of every caption of the items."""
  captions = list(dict.fromkeys(caption for item in items for caption in item.captions))
  return dict(zip(captions, networks.text(captions), strict=True)) if captions else {}


def _batches(
  clips: Iterator[tuple[StageClip, Frames]], networks: FrozenNetworks
) -> Iterator[list[tuple[StageClip, Frames]]]:
  """Groups clips of one stage and bucket, as many as the networks take; fewer at the end."""
  waiting: dict[tuple[str, Bucket], list[tuple[StageClip, Frames]]] = {}
  for staged, frames in clips:
    key = staged.stage, staged.clip.bucket
    waiting.setdefault(key, []).append((staged, frames))
    if len(waiting[key]) == networks.batch_size(staged.clip.bucket):
      yield waiting.pop(key)
  for key in sorted(waiting):
    yield waiting[key]


def _finish(
  stages: Sequence[Stage], refusals: list[Refusal], output: epath.Path, config: TrainConfig
) -> Counts:
  """Waits for the shards of the other hosts; the first host then adds the index.

  It also keeps the config, so that `inspect` knows what the dataset is for.
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
    text = "".join(json.dumps(line._asdict()) + "\n" for line in sorted(lines, key=by_line))
    with disk_errors(output):
      write_atomically(output / "quarantine.jsonl", text.encode())
      kept = json.dumps({**to_dict(config), "version": __version__})
      write_atomically(output / "config.json", kept.encode())
  hosts.wait("encoded")
  clips = sum(stage.writer.counts().clips for stage in stages)
  if not clips:
    raise UserError(_nothing_encoded(output, lines))
  return Counts(clips, len(lines))


def _nothing_encoded(output: epath.Path, refusals: Iterable[Refusal]) -> str:
  """Says why no clip was encoded: the most frequent reasons, with how many files each refused."""
  reasons = Counter(refusal.reason for refusal in refusals)
  shown = [
    f"  {count}x {textwrap.shorten(reason, 140)}" for reason, count in reasons.most_common(REASONS)
  ]
  if more := len(reasons) - len(shown):
    shown.append(f"  and {more} more reasons")
  way_out = (
    f"Each is in {output / 'quarantine.jsonl'}. Mend them, or the config's stages, then choose "
    "another --output or delete that folder."
  )
  return "\n".join(
    [
      f"Not one clip was encoded: all {reasons.total()} files or lines were refused.",
      *shown,
      way_out,
    ]
  )
