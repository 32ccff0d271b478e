"""Clips to Examples: the frozen VAE and text encoder over the data, once.

The manifest's items are cut into shards of a fixed number, in order; a shard is written whole or
not at all. So a killed run loses at most one shard's work, and goes on where it was.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float
from ml_collections import ConfigDict
from tqdm import tqdm

from cogvideox_jax import config as configs
from cogvideox_jax.conversion.folder import ModelFolder, open_model
from cogvideox_jax.conversion.tensors import Params
from cogvideox_jax.data import buckets, video
from cogvideox_jax.data.buckets import Bucket
from cogvideox_jax.data.files import disk_errors, write_atomically
from cogvideox_jax.data.manifest import Item, read_manifest
from cogvideox_jax.data.records import Counts, ShardWriter, identity, storage_fault
from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.models import vae
from cogvideox_jax.models.graphs import compute_dtype, graph_of
from cogvideox_jax.models.t5 import T5Encoder, encode_text
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.types import Clip, Example

SHARD_ITEMS = 128  # What a killed run does again, at most; of 49x480x720, a shard is 0.8 GB.
BATCH_CLIPS = 16  # At most this many clips of one bucket go through the VAE together,
BATCH_PIXELS = 2**22  # and about this many pixels; but always one clip.


def encode(
  config: ConfigDict, source: epath.PathLike, output: epath.PathLike, model: str
) -> Counts:
  """Encodes the clips of a manifest or folder into OUTPUT/STAGE, for each stage of the config.

  A clip that cannot be used gets its line in OUTPUT/quarantine.jsonl. Called again, it finishes
  what is missing.

  Args:
    model: a shipped name or a model folder, whose VAE, text encoder and tokenizer are used.

  Returns:
    How many clips were encoded, and how many refused, over all stages.

  Raises:
    UserError: the config, the source, the model or the output cannot be used; before any work.
  """
  configs.check(config, model)
  items, refusals = read_manifest(source)
  encoders = Encoders(open_model(model), config)
  output = epath.Path(output)
  stages = [_Stage(encoders, items, output / name, config, name) for name in config.stages]
  lines = [refusal._asdict() for refusal in refusals]
  counts = []
  for stage in stages:
    counts.append(stage.run())
    lines += stage.writer.refusals()
  text = "".join(json.dumps(line) + "\n" for line in lines)
  with disk_errors(output):
    write_atomically(output / "quarantine.jsonl", text.encode())
  return Counts(sum(count.clips for count in counts), len(lines))


class Encoders:
  """The frozen networks of a model folder, as functions of host arrays."""

  def __init__(self, folder: ModelFolder, config: ConfigDict):
    vae_config, vae_params = folder.vae()
    text_config, text_params = folder.text_encoder()
    # The VAE computes in float32, as in sampling: latents are what training must reproduce.
    floats = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), vae_params)
    self._vae = nnx.merge(graph_of(VAE, vae_config), floats)
    self._text_params = jax.device_put(text_params)
    self._text_graph = graph_of(T5Encoder, text_config, dtype=compute_dtype(config.dtype))
    self._tokenizer: Tokenizer = folder.tokenizer()
    self._text_length: int = config.model.text_length
    self.digest = _digest({"vae": vae_params, "text": text_params})

  def text(self, captions: Sequence[str]) -> Float[np.ndarray, "b l t"]:
    """T5's states. Always of one batch size, so that there is one program."""
    ids = self._tokenizer.encode(list(captions), self._text_length)
    states = encode_text(self._text_params, _fill(ids, BATCH_CLIPS), graphdef=self._text_graph)
    return np.asarray(states)[: len(captions)]

  def moments(
    self, clips: Sequence[Clip], batch: int
  ) -> tuple[Float[np.ndarray, "b f h w c"], Float[np.ndarray, "b f h w c"]]:
    """Mean and log-variance of clips of one bucket; computed `batch` at a time."""
    frames = _fill(np.stack([clip.frames for clip in clips]), batch)
    mean, logvar = vae.encode(self._vae, jnp.float32(frames) / 127.5 - 1)
    return np.asarray(mean)[: len(clips)], np.asarray(logvar)[: len(clips)]


class Planned(NamedTuple):
  """An item whose file could be opened, and the bucket that it is brought to."""

  item: Item
  bucket: Bucket


class _Stage:
  """One dataset in the making."""

  def __init__(
    self, encoders: Encoders, items: list[Item], folder: epath.Path, config: ConfigDict, name: str
  ):
    self._encoders, self._items, self._name = encoders, items, name
    self._fps, self._sizes = config.data.fps, config.stages[name].sizes
    self._durations = config.stages[name].durations
    made_from = identity(
      {
        "items": [[item.id, str(item.file.name), *item.captions] for item in items],
        "model": encoders.digest,
        "text_length": config.model.text_length,
        "buckets": [self._sizes, self._durations, self._fps],
      }
    )
    self.writer = ShardWriter(folder, max(1, -(-len(items) // SHARD_ITEMS)), made_from)

  def run(self) -> Counts:
    """Writes the shards that are missing."""
    pending = self.writer.pending()
    shards = [self._items[shard * SHARD_ITEMS :][:SHARD_ITEMS] for shard in pending]
    done = len(self._items) - sum(map(len, shards))
    bar = tqdm(total=len(self._items), initial=done, desc=f"Encoding {self._name}", unit="clip")
    with bar:
      for shard, items in zip(pending, shards, strict=True):
        refusals: list[dict[str, Any]] = []
        self.writer.write_shard(shard, self._examples(items, refusals, bar), refusals)
    return self.writer.finalize()

  def _examples(
    self, items: list[Item], refusals: list[dict[str, Any]], bar: tqdm
  ) -> Iterator[Example]:
    """Examples of a shard, bucket by bucket; adds to the refusals as it meets them."""

    def refuse(item: Item, reason: str) -> None:
      refusals.append({"file": str(item.file.name), "line": item.line, "reason": reason})
      bar.update()

    by_bucket: dict[Bucket, list[Planned]] = {}
    for item in items:
      planned = self._plan(item, refuse)
      if planned:
        by_bucket.setdefault(planned.bucket, []).append(planned)
    for bucket, members in sorted(by_bucket.items()):
      pixels = bucket.num_frames * bucket.height * bucket.width
      batch = min(max(BATCH_PIXELS // pixels, 1), BATCH_CLIPS)
      for start in range(0, len(members), batch):
        group = members[start : start + batch]
        pairs = [(one.item, clip) for one in group if (clip := self._read(one, refuse))]
        for item, example in self._encode(pairs, batch):
          if fault := storage_fault(example):
            refuse(item, fault)
            continue
          bar.update()
          yield example

  def _plan(self, item: Item, refuse) -> Planned | None:
    try:
      info = video.probe(item.file)
    except video.VideoError as error:
      return refuse(item, str(error))
    bucket = buckets.assign(info, self._sizes, self._durations, self._fps)
    if bucket is None:
      shortest = f"{min(self._durations)} frames at {self._fps:g} frames a second"
      return refuse(item, f"{info.seconds:.2f} s is shorter than {shortest}")
    return Planned(item, bucket)

  def _read(self, planned: Planned, refuse) -> Clip | None:
    item, bucket = planned
    try:
      frames = video.read(item.file, fps=self._fps, **bucket._asdict())
    except video.VideoError as error:
      return refuse(item, str(error))
    return Clip(frames, item.captions[0], item.id, self._fps)

  def _encode(self, pairs: list[tuple[Item, Clip]], batch: int) -> Iterator[tuple[Item, Example]]:
    if not pairs:
      return
    clips = [clip for _, clip in pairs]
    moments = self._encoders.moments(clips, batch)
    texts = self._encoders.text([clip.caption for clip in clips])
    for (item, clip), mean, logvar, text in zip(pairs, *moments, texts, strict=True):
      num_frames, height, width = clip.frames.shape[:3]
      yield (
        item,
        Example(mean, logvar, text, clip.caption, clip.source, num_frames, height, width, clip.fps),
      )


def _fill(array: np.ndarray, count: int) -> np.ndarray:
  """Repeats the last entry until there are `count`: every batch has one shape."""
  return np.concatenate([array, np.repeat(array[-1:], count - len(array), axis=0)])


def _digest(params: Params) -> str:
  """sha256 of all arrays, in path order."""
  total = hashlib.sha256()
  for path, leaf in jax.tree.leaves_with_path(params):
    total.update(jax.tree_util.keystr(path).encode())
    total.update(np.asarray(leaf).tobytes())
  return total.hexdigest()
