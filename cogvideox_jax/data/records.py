"""Reads encoded datasets: `Example`s in ArrayRecord shards that TFDS opens, and an index.

A folder holds:

- `clips-train.array_record-J-of-N`: the shards;
- `shards.json`: what they are made from;
- `encoded_by.json`: what encoded them (see encoded_by.py), unless an earlier version did;
- `shards/J.json`: what shard J holds, and what it refused;
- once all shards are there, `index.npz` (the clips' metadata in columns), the two JSON files of
  TFDS, and `sha256sums.txt` (the digests of the shards and the index, in sha256sum's format).

A shard is written under another name and then renamed, so that a killed run leaves only whole
shards. Nothing here imports TensorFlow.

A record holds a clip with all its captions: `captions` is a list of k texts, and `text` holds their
states as one array [k l t]. A missing `score` is NaN; a missing `image` is an empty list.

Latents are stored as float16. They are a few units wide, and log-variances lie in [-30, 20], so
float16's 11 bits of precision are worth more than bfloat16's range. Text states are stored as
bfloat16, because those of T5-XXL can exceed float16's 65504, and T5 and the transformer compute in
bfloat16. TFDS sees their bits as uint16.
"""

import os
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from jaxtyping import Float

from cogvideox_jax.data import encoded_by
from cogvideox_jax.data.colours import SDR
from cogvideox_jax.data.dataset_index import (
  DIGESTS,
  MEND,
  Index,
  check_file,
  read_index,
)
from cogvideox_jax.errors import UserError
from cogvideox_jax.types import Caption, Example

FORMAT = 2  # The version of records and index. Version 1 had one caption a clip, and no score.
DATASET, SPLIT = "clips", "train"  # Their names for TFDS. The loader chooses validation clips.

FEATURES: Any = tfds.features.FeaturesDict(
  {
    "mean": tfds.features.Tensor(shape=(None,) * 4, dtype=np.float16, encoding="bytes"),
    "logvar": tfds.features.Tensor(shape=(None,) * 4, dtype=np.float16, encoding="bytes"),
    "text": tfds.features.Tensor(
      shape=(None,) * 3,
      dtype=np.uint16,
      encoding="bytes",
      doc="[captions, tokens, width]: the bits of bfloat16 numbers.",
    ),
    "image": tfds.features.Sequence(
      tfds.features.Tensor(shape=(None,) * 4, dtype=np.float16, encoding="bytes"),
      doc="Mean and log-variance of each noised copy of the first frame.",
    ),
    "captions": tfds.features.Sequence(tfds.features.Text()),
    "score": tfds.features.Scalar(dtype=np.float32, doc="NaN: none."),
    "source": tfds.features.Text(),
    "num_frames": tfds.features.Scalar(dtype=np.int64),
    "height": tfds.features.Scalar(dtype=np.int64),
    "width": tfds.features.Scalar(dtype=np.int64),
    "fps": tfds.features.Scalar(dtype=np.float32),
    "transfer": tfds.features.Text(doc="hlg or pq if the file was HDR; else records lack it."),
  }
)


_SERIALIZER = tfds.core.ExampleSerializer(FEATURES.get_serialized_info())
# What ArrayRecord raises for damaged files, found by flipping bits of them.
_READ_FAULTS = (RuntimeError, ValueError, IndexError, OSError)
_AS_THEY_ARE = ("source", "num_frames", "height", "width", "fps")  # Fields stored unchanged.


def storage_fault(example: Example) -> str | None:
  """Returns why the example cannot be stored, as a line for the quarantine; None if it can."""
  captions, texts = _captions_of(example)
  for name, words in (("caption", "".join(captions)), ("source", example.source)):
    try:
      words.encode()
    except UnicodeEncodeError:
      return f"its {name} is not valid Unicode"
  for name, array, dtype in (
    ("mean", example.mean, np.float16),
    ("logvar", example.logvar, np.float16),
    ("image", image_of(example), np.float16),
    ("text", texts, ml_dtypes.bfloat16),
  ):
    if not np.isfinite(_cast(array, dtype)).all():
      return f"its {name} is not finite in {np.dtype(dtype).name}"
  return None


def serialize(example: Example) -> bytes:
  """Returns an `Example` as the bytes of a tf.train.Example; ValueError if it cannot be stored."""
  if fault := storage_fault(example):
    raise ValueError(f"{example.source!r} cannot be stored: {fault}")
  captions, texts = _captions_of(example)
  fields = {
    "mean": _cast(example.mean, np.float16),
    "logvar": _cast(example.logvar, np.float16),
    "image": list(_cast(image_of(example), np.float16)),
    "text": _cast(texts, ml_dtypes.bfloat16).view(np.uint16),
    "captions": captions,
    "score": np.nan if example.score is None else example.score,
    **{name: getattr(example, name) for name in _AS_THEY_ARE},
  }
  fields["transfer"] = example.transfer
  message = _SERIALIZER.get_tf_example(FEATURES.encode_example(fields))
  if example.transfer == SDR:  # So that records are those of versions that did not know it.
    del message.features.feature["transfer"]
  # TFDS's own serialization orders the fields by addresses, which differ between processes.
  return message.SerializeToString(deterministic=True)


def parse(record: bytes) -> Example:
  """Reads what `serialize` wrote: latents in float16, text in bfloat16."""
  fields = FEATURES.deserialize_example_np(record)
  texts, score = fields["text"].view(ml_dtypes.bfloat16), float(fields["score"])
  captions = [caption.decode() for caption in fields["captions"]]
  first, *others = map(Caption, captions, texts)
  return Example(
    mean=fields["mean"],
    logvar=fields["logvar"],
    **first._asdict(),
    **{name: fields[name] for name in _AS_THEY_ARE} | {"source": fields["source"].decode()},
    score=None if np.isnan(score) else score,
    others=tuple(others),
    image=fields["image"] if len(fields["image"]) else None,
    transfer=SDR if fields["transfer"] is None else fields["transfer"].decode(),
  )


def _captions_of(example: Example) -> tuple[list[str], Float[np.ndarray, "_ l t"]]:
  """Returns all captions of an example, and their states."""
  captions = [Caption(example.caption, example.text), *example.others]
  return [one.caption for one in captions], np.stack([one.text for one in captions])


def image_of(example: Example) -> Float[np.ndarray, "draws 2 h w c"]:
  """Returns the noised first frames as they are stored: no draw if there is no image."""
  return np.zeros((0, 2, 1, 1, 1), np.float32) if example.image is None else example.image


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
  with np.errstate(over="ignore"):  # It becomes infinite, which `storage_fault` reports.
    return np.ascontiguousarray(array).astype(dtype)


class Dataset:
  """A finished encoded dataset: its index, and random access to its examples, from any thread."""

  def __init__(self, directory: epath.PathLike):
    """Reads only the index. UserError if the dataset is absent, unfinished, empty or damaged."""
    self.directory = epath.Path(directory)
    arrays = read_index(self.directory)
    self.index = Index(*(arrays[name] for name in Index._fields))
    self.digest = str(arrays["digest"])  # It depends on all records, and on nothing else.
    check_file(self.directory / encoded_by.NAME)
    self.encoded_by = encoded_by.read(self.directory)  # None: an earlier version encoded them.
    self._names, self._name_ends = arrays["names"], arrays["name_ends"]
    if not len(self):
      raise UserError(f"{self.directory} is empty: every clip was refused, see quarantine.jsonl")
    self._shard_lengths = arrays["shard_lengths"]
    self._records = ArrayRecordDataSource(self._shards(self._shard_lengths, arrays["shard_bytes"]))

  def __len__(self) -> int:
    return len(self.index.source_hash)

  def __getitem__(self, clip: int) -> Example:
    """Reads a clip. UserError if its shard is damaged there."""
    try:
      # A hash of each record's bytes is checked, so that what is read is what was written.
      record = self._records[clip]
    except _READ_FAULTS as error:
      raise self._damaged(clip, error) from error
    return parse(record)

  def source(self, clip: int) -> str:
    start = self._name_ends[clip - 1] if clip else 0
    return self._names[start : self._name_ends[clip]].tobytes().decode()

  def file(self, clip: int) -> epath.Path:
    """Returns the file that holds a clip."""
    shard = int(np.searchsorted(np.cumsum(self._shard_lengths), clip, side="right"))
    return self.directory / shard_name(shard, len(self._shard_lengths))

  def _damaged(self, clip: int, error: Exception) -> UserError:
    """Says which file is damaged, and how to mend it."""
    path = self.file(clip)
    reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    return UserError(
      f"{path} is damaged: the clip {self.source(clip)!r} cannot be read.\n"
      f"({reason})\n{MEND}\n"
      f"Until then nothing can be trained on {self.directory}; "
      f"`sha256sum --check {DIGESTS}` there lists what is damaged."
    )

  def _shards(self, lengths: np.ndarray, sizes: np.ndarray) -> list[str]:
    """Lists the shards that hold records. With their lengths ArrayRecord need not open them all."""
    shards = []
    for shard, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
      path = self.directory / shard_name(shard, len(lengths))
      if not path.exists() or path.stat().length != size:
        raise UserError(f"{path} is missing or cut short.\n{MEND}")
      if length:
        shards.append(f"{os.fspath(path)}[0:{length}]")
    return shards


def stage_folder(path: epath.PathLike, stage: str) -> epath.Path:
  """Returns the folder of a stage's dataset, given this folder or the one that holds it.

  `encode` writes the datasets of all stages into one folder.
  """
  folder = epath.Path(path)
  return folder if (folder / "index.npz").exists() else folder / stage


def shard_name(shard: int, num_shards: int) -> str:
  return f"{DATASET}-{SPLIT}.array_record-{shard:05d}-of-{num_shards:05d}"
