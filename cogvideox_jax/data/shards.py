"""Writes encoded datasets: each shard as a whole or not at all, and then the index.

records.py describes the folder.
"""

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from cogvideox_jax.data import encoded_by, shard_notes
from cogvideox_jax.data.dataset_index import DIGESTS, INDEX
from cogvideox_jax.data.encoded_by import EncodedBy
from cogvideox_jax.data.files import (
  disk_errors,
  new_draft,
  remove_drafts,
  settle,
  sha256,
  write_arrays,
  write_atomically,
)
from cogvideox_jax.data.records import (
  FEATURES,
  FORMAT,
  SPLIT,
  serialize,
  shard_name,
)
from cogvideox_jax.data.shard_columns import columns, metadata
from cogvideox_jax.data.shard_notes import Note
from cogvideox_jax.errors import UserError
from cogvideox_jax.types import Example

_PLAN, _SETTINGS = "shards.json", "settings"  # The file of a dataset's plan, and a key of it.


class Counts(NamedTuple):
  """How many clips were encoded, and how many lines or files were refused."""

  clips: int
  refused: int


class ShardWriter:
  """An encoded dataset that is being written: a fixed number of shards, each written once."""

  def __init__(
    self,
    directory: epath.PathLike,
    num_shards: int,
    made_from: str,
    encoders: EncodedBy | None = None,
    settings: str | None = None,
  ):
    """Opens or begins a dataset.

    Args:
      num_shards: at least 1.
      made_from: `shard_notes.identity` of the items, the settings and the networks.
      encoders: what encodes the examples. None: it is not known, and is not recorded.
      settings: as in `check_begun`; None: it is not recorded.

    Raises:
      UserError: the folder holds a dataset that was made from something else.
    """
    if num_shards < 1:
      raise UserError(f"there is nothing to encode into {directory}: no clips were found")
    self.directory = epath.Path(directory)
    self.num_shards = num_shards
    plan = {"format": FORMAT, "made_from": made_from, "num_shards": num_shards}
    recorded = plan if settings is None else {**plan, _SETTINGS: settings}
    path = self.directory / _PLAN
    with disk_errors(self.directory):
      (self.directory / "shards").mkdir(parents=True, exist_ok=True)
      if not path.exists():
        if encoders:
          encoded_by.write(self.directory, encoders)
        write_atomically(path, json.dumps(recorded).encode())
      found = _read_plan(path)
    found.pop(_SETTINGS, None)
    if found != plan or (encoders and not self._is_encoded_by(encoders)):
      raise _other_clips(self.directory)

  def _is_encoded_by(self, encoders: EncodedBy) -> bool:
    """Whether these networks encode the dataset, which was begun before.

    If an earlier version began it, which recorded nothing, they do, because `made_from` is the
    same. They are recorded then.
    """
    known = encoded_by.read(self.directory)
    if known is None:
      with disk_errors(self.directory):
        encoded_by.write(self.directory, encoders._replace(version=None))
      return True
    return known.networks == encoders.networks

  def pending(self, among: Iterable[int] | None = None) -> list[int]:
    """Lists the shards that are still to be written, of all or of some, in order."""
    shards = range(self.num_shards) if among is None else among
    return [shard for shard in shards if self._whole(shard) is None]

  def discard_damaged(self, shard: int) -> bool:
    """Deletes a shard whose bytes are not as they were written, so that it is pending again.

    It reads all of the shard. Returns whether it was damaged.
    """
    note = self._whole(shard)
    if note is None or sha256(self._path(shard)) == note["sha256"]:
      return False
    self._path(shard).unlink()
    return True

  def write_shard(
    self,
    shard: int,
    examples: Iterable[Example],
    refusals: Iterable[dict[str, Any]] = (),
  ) -> None:
    """Writes one shard as a whole, or nothing.

    Args:
      refusals: objects of quarantine.jsonl, for the items that gave no example. They are read after
        the last example, so a generator of examples may add to them.
    """
    opened = self.open_shard(shard)
    for example in examples:
      opened.write(example)
    opened.close(refusals)

  def open_shard(self, shard: int) -> "OpenShard":
    """Begins to write a shard."""
    return OpenShard(self._path(shard), self._note_path(shard))

  def refusals(self) -> list[dict[str, Any]]:
    """Returns what was refused in all shards that are written, in order."""
    return [refusal for note in self._notes() for refusal in note["refusals"]]

  def counts(self) -> Counts:
    """Counts over all shards that are written."""
    notes = list(self._notes())
    return Counts(
      sum(len(note["clips"]) for note in notes), sum(len(note["refusals"]) for note in notes)
    )

  def finalize(self) -> Counts:
    """Writes the index, TFDS's metadata and the digests. It may be called again.

    Raises ValueError if a shard is missing.
    """
    if missing := self.pending():
      raise ValueError(f"{self.directory} lacks {len(missing)} of {self.num_shards} shards")
    notes = list(self._notes())
    lengths = [len(note["clips"]) for note in notes]
    clips = [clip for note in notes for clip in note["clips"]]
    with disk_errors(self.directory):
      if clips:
        self._write_tfds_metadata(lengths, sum(note["bytes"] for note in notes))
      write_arrays(self.directory / INDEX, columns(notes, lengths, clips))
      self._write_digests(notes)
      for shard in range(self.num_shards):  # Left by runs that were killed.
        remove_drafts(self._path(shard))
        remove_drafts(self._note_path(shard))
    return self.counts()

  def _write_digests(self, notes: list[dict[str, Any]]) -> None:
    digests = {self._path(shard).name: note["sha256"] for shard, note in enumerate(notes)}
    for name in (INDEX, encoded_by.NAME):
      if (self.directory / name).exists():
        digests[name] = sha256(self.directory / name)
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    write_atomically(self.directory / DIGESTS, lines.encode())

  def _path(self, shard: int) -> epath.Path:
    return self.directory / shard_name(shard, self.num_shards)

  def _note_path(self, shard: int) -> epath.Path:
    return self.directory / "shards" / f"{shard:05d}.json"

  def _notes(self) -> Iterator[Note]:
    for shard in range(self.num_shards):
      if note := self._whole(shard):
        yield note

  def _whole(self, shard: int) -> Note | None:
    """Returns the note of a shard that is written, by its size; None if it is not."""
    path, note = self._path(shard), shard_notes.read(self._note_path(shard))
    if note is None or not path.exists() or path.stat().length != note["bytes"]:
      return None
    return note

  def _write_tfds_metadata(self, lengths: list[int], size: int) -> None:
    split = tfds.core.SplitInfo(name=SPLIT, shard_lengths=lengths, num_bytes=size)
    tfds.folder_dataset.write_metadata(
      data_dir=os.fspath(self.directory),
      features=FEATURES,
      split_infos=[split],
      check_data=False,  # A check would import TensorFlow.
      description="Video clips after CogVideoX's VAE and text encoder.",
    )


class OpenShard:
  """A shard that is being written. It exists only once it is closed."""

  def __init__(self, path: epath.Path, note_path: epath.Path):
    self._path, self._note_path = path, note_path
    self._clips: list[dict[str, Any]] = []
    with disk_errors(path):
      remove_drafts(path)  # A shard has one writer, so they are of runs that were killed.
      self._partial = new_draft(path)
      # One record a group, for random access. Uncompressed, because latents do not compress.
      self._writer = ArrayRecordWriter(os.fspath(self._partial), "group_size:1,uncompressed")

  def write(self, example: Example) -> None:
    """Adds an example; ValueError if it cannot be stored."""
    record = serialize(example)
    with disk_errors(self._partial):
      self._writer.write(record)
    self._clips.append(metadata(example))

  def close(self, refusals: Iterable[dict[str, Any]]) -> None:
    """Finishes the shard.

    Args:
      refusals: objects of quarantine.jsonl, for items that gave no example.
    """
    with disk_errors(self._partial):
      self._writer.close()
      note = {"clips": self._clips, "refusals": list(refusals), **settle(self._partial)}
      shard_notes.write(self._note_path, note)
      # Last, because a shard counts as written once it has its name.
      self._partial.replace(self._path)


def check_begun(directory: epath.Path, num_shards: int, settings: str) -> None:
  """Raises a UserError if a folder holds a dataset of other items or settings.

  It needs no network, so it can tell before any is read. `ShardWriter` compares the networks, too.

  Args:
    settings: `shard_notes.identity` of the items and settings.
  """
  path = directory / _PLAN
  if not path.exists():
    return
  found = _read_plan(path)
  # An earlier version recorded one digest alone, of the networks, too.
  known = found.get(_SETTINGS, settings)
  if (found.get("format"), found.get("num_shards"), known) != (FORMAT, num_shards, settings):
    raise _other_clips(directory)


def check_networks(directory: epath.Path, encoders: EncodedBy) -> None:
  """Raises a UserError if it is recorded that other networks encode the dataset in a folder."""
  known = encoded_by.read(directory)
  if known and known.networks != encoders.networks:
    raise _other_clips(directory)


def _other_clips(directory: epath.Path) -> UserError:
  return UserError(
    f"{directory} holds clips that were encoded from other files or settings.\n"
    "Choose another --output, or delete that folder to encode again."
  )


def _read_plan(path: epath.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
      raise ValueError("it must hold one JSON object")
    return found
  except ValueError as error:
    raise UserError(
      f"{path} is damaged ({error}).\nIf the dataset was made from the same files and settings, "
      "delete this file and run the same encode command again; else delete the whole folder."
    ) from error
