"""Reads the index of an encoded dataset, and finds files that are not as they were written."""

import struct
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Int, UInt64

from cogvideox_jax.data.files import sha256
from cogvideox_jax.errors import UserError

INDEX, DIGESTS = "index.npz", "sha256sums.txt"
MEND = "Run the same encode command again: it writes anew what is damaged."
NOT_FINISHED = "Make it with `python -m cogvideox_jax.encode`; the same command finishes it."
# The columns of the index that are not those of `Index`.
_OTHERS = {"names", "name_ends", "shard_lengths", "shard_bytes", "digest"}
# What numpy and zipfile raise for damaged .npz files, found by flipping every byte.
NPZ_FAULTS = (
  *(ValueError, EOFError, KeyError, OSError, RuntimeError, MemoryError),
  *(zipfile.BadZipFile, zlib.error, struct.error),
)


class Index(NamedTuple):
  """The metadata of a dataset's clips in columns, in the order of the records."""

  num_frames: Int[np.ndarray, " clips"]  # In pixels, like height and width.
  height: Int[np.ndarray, " clips"]
  width: Int[np.ndarray, " clips"]
  fps: Float[np.ndarray, " clips"]
  latent_shape: Int[np.ndarray, "clips 4"]  # (f, h, w, c).
  text_shape: Int[np.ndarray, "clips 2"]  # (l, t).
  source_hash: UInt64[np.ndarray, " clips"]  # See `clips.source_hash`.
  captions: Int[np.ndarray, " clips"]  # The number of captions, at least 1.
  score: Float[np.ndarray, " clips"]  # NaN if there is none.
  images: Int[np.ndarray, " clips"]  # The number of noised copies of the first frame, maybe 0.


def read_index(directory: epath.Path) -> dict[str, np.ndarray]:
  """Returns the columns of a dataset's index: those of `Index`, and those of its shards and names.

  Raises:
    UserError: it is absent, damaged, or of an earlier version.
  """
  path = directory / INDEX
  try:
    with path.open("rb") as file, np.load(file) as arrays:
      columns = dict(arrays)
  except FileNotFoundError as error:
    raise UserError(
      f"{directory} is not an encoded dataset, or was not finished.\n{NOT_FINISHED}"
    ) from error
  except NPZ_FAULTS as error:
    raise UserError(f"{path} is damaged.\n{MEND}") from error
  wanted = {*Index._fields, *_OTHERS}
  missing = wanted - columns.keys()
  # Earlier versions had these; and where a name is damaged, there is one that is not known.
  if missing and not missing & _OTHERS and not columns.keys() - wanted:
    raise UserError(
      f"{directory} was encoded by an earlier version: its index lacks "
      f"{', '.join(sorted(missing))}.\nEncode the clips again, into another folder."
    )
  if missing:
    raise UserError(f"{path} is damaged.\n{MEND}")
  check_file(path)
  return columns


def check_file(path: epath.Path) -> None:
  """Raises a UserError if a small file of a dataset is not as it was written.

  It passes if the dataset does not list its digest.
  """
  expected = _digests(path.parent).get(path.name)
  if expected and path.exists() and sha256(path) != expected:
    raise UserError(f"{path} is damaged: its sha256 is not that of {DIGESTS}.\n{MEND}")


def damaged_files(directory: epath.PathLike, share: slice = slice(None)) -> list[str]:
  """Names the shards, and the index, that are not as they were written. Reads all of them.

  `sha256sum --check sha256sums.txt` in the folder does the same. UserError if there is no such
  file.

  Args:
    share: which of the files, in the order of the list, to check; other processes check the others.
  """
  directory = epath.Path(directory)
  if not (directory / DIGESTS).exists():
    raise UserError(
      f"{directory} has no {DIGESTS}: it is not an encoded dataset, or was not finished.\n"
      f"{NOT_FINISHED}"
    )
  return [
    name
    for name, digest in list(_digests(directory).items())[share]
    if not (directory / name).exists() or sha256(directory / name) != digest
  ]


def _digests(directory: epath.Path) -> dict[str, str]:
  """Returns the digests in sha256sums.txt by the names of files; empty if there is no such file."""
  path = directory / DIGESTS
  if not path.exists():
    return {}
  lines = path.read_bytes().decode(errors="replace").splitlines()
  pairs = [line.split("  ", 1) for line in lines]
  return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}
