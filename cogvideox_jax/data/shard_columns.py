"""The columns of a dataset's index, from what the notes of its shards say of each clip."""

from typing import Any

import numpy as np

from cogvideox_jax.data.clips import source_hash
from cogvideox_jax.data.records import image_of
from cogvideox_jax.data.shard_notes import Note, identity
from cogvideox_jax.types import Example


def metadata(example: Example) -> dict[str, Any]:
  """Returns what the note of a shard says of a clip."""
  return {
    "source": example.source,
    "num_frames": int(example.num_frames),
    "height": int(example.height),
    "width": int(example.width),
    "fps": float(example.fps),
    "latent_shape": example.mean.shape,
    "text_shape": example.text.shape,
    "captions": 1 + len(example.others),
    "score": example.score,
    "images": len(image_of(example)),
  }


def columns(notes: list[Note], lengths: list[int], clips: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns the arrays of index.npz."""
  names = [clip["source"].encode() for clip in clips]
  scores = [np.nan if clip["score"] is None else clip["score"] for clip in clips]

  def column(name: str) -> np.ndarray:
    return np.array([clip[name] for clip in clips], np.int32)

  return {
    "num_frames": column("num_frames"),
    "height": column("height"),
    "width": column("width"),
    "latent_shape": column("latent_shape").reshape(-1, 4),
    "text_shape": column("text_shape").reshape(-1, 2),
    "fps": np.array([clip["fps"] for clip in clips], np.float32),
    "source_hash": np.array([source_hash(clip["source"]) for clip in clips], "<u8"),
    "captions": column("captions"),
    "score": np.array(scores, np.float32),
    "images": column("images"),
    "names": np.frombuffer(b"".join(names), np.uint8),
    "name_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
    "shard_lengths": np.array(lengths),
    "shard_bytes": np.array([note["bytes"] for note in notes]),
    "digest": np.array(identity([note["sha256"] for note in notes])),
  }
