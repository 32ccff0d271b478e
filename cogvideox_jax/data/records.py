"""Encoded datasets: `Example`s in ArrayRecord shards that TFDS opens, and an index of metadata.

A folder holds `clips-train.array_record-J-of-N` (the shards), `shards.json` (what they are made
from), `shards/J.json` (what shard J holds and refused), and once all shards are there
`index.npz` (the clips' metadata in columns), TFDS's own two JSON files and `sha256sums.txt` (the
digests of all shards and of the index, as sha256sum writes and checks them). A shard is written
under another name and then renamed, so that a killed run leaves whole shards only. Nothing here
imports TensorFlow.

A record holds a clip with all its captions: `captions` is a list of k texts, and `text` holds
their states as one array [k l t], so that k = 1 costs nothing. `score` is NaN where there is none,
and `image` holds no draw.

Latents are stored as float16: they are a few units wide (and log-variances lie in [-30, 20]), so
its 11 bits of precision are worth more than bfloat16's range. Text states are stored as
bfloat16, since those of T5-XXL can pass float16's 65504, and bfloat16 is what T5 and the
transformer compute in; TFDS sees its bits as uint16.
"""

import os
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from jaxtyping import Float, Int, UInt64

from cogvideox_jax.data.files import sha256
from cogvideox_jax.errors import UserError
from cogvideox_jax.types import Caption, Example

FORMAT = 2  # Of the records and the index; 1 held one caption a clip, and no score.
INDEX, DIGESTS = "index.npz", "sha256sums.txt"
DATASET, SPLIT = "clips", "train"  # As TFDS calls them. Validation clips are chosen by the loader.

FEATURES: Any = tfds.features.FeaturesDict(
  {
    "mean": tfds.features.Tensor(shape=(None,) * 4, dtype=np.float16, encoding="bytes"),
    "logvar": tfds.features.Tensor(shape=(None,) * 4, dtype=np.float16, encoding="bytes"),
    "text": tfds.features.Tensor(
      shape=(None,) * 3,
      dtype=np.uint16,
      encoding="bytes",
      doc="Of each caption, tokens, width; the bits of bfloat16 numbers.",
    ),
    "image": tfds.features.Sequence(
      tfds.features.Tensor(shape=(None,) * 4, dtype=np.float16, encoding="bytes"),
      doc="Of each noised copy of the first frame, mean and log-variance.",
    ),
    "captions": tfds.features.Sequence(tfds.features.Text()),
    "score": tfds.features.Scalar(dtype=np.float32, doc="NaN: none."),
    "source": tfds.features.Text(),
    "num_frames": tfds.features.Scalar(dtype=np.int64),
    "height": tfds.features.Scalar(dtype=np.int64),
    "width": tfds.features.Scalar(dtype=np.int64),
    "fps": tfds.features.Scalar(dtype=np.float32),
  }
)


_SERIALIZER = tfds.core.ExampleSerializer(FEATURES.get_serialized_info())
_AS_THEY_ARE = ("source", "num_frames", "height", "width", "fps")  # Fields stored unchanged.


class Index(NamedTuple):
  """The metadata of a dataset's clips in columns, in the order of the records."""

  num_frames: Int[np.ndarray, " clips"]  # In pixels, as are height and width.
  height: Int[np.ndarray, " clips"]
  width: Int[np.ndarray, " clips"]
  fps: Float[np.ndarray, " clips"]
  latent_shape: Int[np.ndarray, "clips 4"]  # (f, h, w, c).
  text_shape: Int[np.ndarray, "clips 2"]  # (l, t).
  source_hash: UInt64[np.ndarray, " clips"]  # Uniform; the same for all clips of a file.
  captions: Int[np.ndarray, " clips"]  # How many the clip has, at least 1.
  score: Float[np.ndarray, " clips"]  # NaN where there is none.
  images: Int[np.ndarray, " clips"]  # Noised copies of the first frame; 0 where there is none.


def storage_fault(example: Example) -> str | None:
  """Why the example cannot be stored, as a line for the quarantine; None if it can."""
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
  """An `Example` as the bytes of a tf.train.Example; ValueError if it cannot be stored."""
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
  message = _SERIALIZER.get_tf_example(FEATURES.encode_example(fields))
  # TFDS itself leaves the order of the fields to the address space of the process.
  return message.SerializeToString(deterministic=True)


def parse(record: bytes) -> Example:
  """The inverse of `serialize`: latents in float16, text in bfloat16."""
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
  )


def _captions_of(example: Example) -> tuple[list[str], Float[np.ndarray, "_ l t"]]:
  """All captions of an example, and their states."""
  captions = [Caption(example.caption, example.text), *example.others]
  return [one.caption for one in captions], np.stack([one.text for one in captions])


def image_of(example: Example) -> Float[np.ndarray, "draws 2 h w c"]:
  """The noised first frames as they are stored: none, where the model sees no image."""
  return np.zeros((0, 2, 1, 1, 1), np.float32) if example.image is None else example.image


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
  with np.errstate(over="ignore"):  # Becomes infinite, which `storage_fault` reports.
    return np.ascontiguousarray(array).astype(dtype)


class Dataset:
  """A finished encoded dataset: its index, and random access to its examples by any thread."""

  def __init__(self, directory: epath.PathLike):
    """Reads the index only. UserError if the dataset is absent, unfinished, empty or damaged."""
    self.directory = epath.Path(directory)
    arrays = self._read_index()
    if missing := set(Index._fields) - arrays.keys():
      raise UserError(
        f"{self.directory} was encoded by an earlier version: its index lacks "
        f"{', '.join(sorted(missing))}.\nEncode the clips again, into another folder."
      )
    self.index = Index(*(arrays[name] for name in Index._fields))
    self.digest = str(arrays["digest"])  # Of all records: the same data, the same digest.
    self._names, self._name_ends = arrays["names"], arrays["name_ends"]
    if not len(self):
      raise UserError(f"{self.directory} is empty: every clip was refused, see quarantine.jsonl")
    self._records = ArrayRecordDataSource(
      self._shards(arrays["shard_lengths"], arrays["shard_bytes"])
    )

  def __len__(self) -> int:
    return len(self.index.source_hash)

  def __getitem__(self, clip: int) -> Example:
    return parse(self._records[clip])

  def source(self, clip: int) -> str:
    start = self._name_ends[clip - 1] if clip else 0
    return self._names[start : self._name_ends[clip]].tobytes().decode()

  def _read_index(self) -> dict[str, np.ndarray]:
    path = self.directory / INDEX
    try:
      with path.open("rb") as file, np.load(file) as arrays:
        return dict(arrays)
    except FileNotFoundError as error:
      raise UserError(
        f"{self.directory} is not an encoded dataset, or was not finished.\n"
        "Make it with `python -m cogvideox_jax.encode`; the same command finishes it."
      ) from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
      raise UserError(f"{path} is damaged.\nRun the same encode command again.") from error

  def _shards(self, lengths: np.ndarray, sizes: np.ndarray) -> list[str]:
    """The shards that hold records, as ArrayRecord wants them: the number spares opening all."""
    shards = []
    for shard, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
      path = self.directory / shard_name(shard, len(lengths))
      if not path.exists() or path.stat().length != size:
        raise UserError(f"{path} is missing or cut short.\nRun the same encode command again.")
      if length:
        shards.append(f"{os.fspath(path)}[0:{length}]")
    return shards


def damaged_files(directory: epath.PathLike) -> list[str]:
  """Names the shards, and the index, that are not as they were written; reads all of them.

  `sha256sum --check sha256sums.txt` in the folder does the same. UserError if nothing says what
  they should be.
  """
  directory = epath.Path(directory)
  try:
    lines = (directory / DIGESTS).read_text().splitlines()
  except FileNotFoundError as error:
    raise UserError(
      f"{directory} has no {DIGESTS}: it is not an encoded dataset, or was not finished.\n"
      "Make it with `python -m cogvideox_jax.encode`; the same command finishes it."
    ) from error
  expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
  paths = {name: directory / name for name in expected}
  return [
    name for name, path in paths.items() if not path.exists() or sha256(path) != expected[name]
  ]


def stage_folder(path: epath.PathLike, stage: str) -> epath.Path:
  """Where a stage's dataset is, given its folder or, as `encode` writes it, the one above."""
  folder = epath.Path(path)
  return folder if (folder / "index.npz").exists() else folder / stage


def shard_name(shard: int, num_shards: int) -> str:
  return f"{DATASET}-{SPLIT}.array_record-{shard:05d}-of-{num_shards:05d}"
