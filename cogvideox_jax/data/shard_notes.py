"""What a shard holds and what it refused: `shards/J.json` in a dataset's folder.

The index is made of these notes. A note carries its own digest, because the index would otherwise
repeat its damage.
"""

import hashlib
import json
from typing import Any

from etils import epath

from cogvideox_jax.data.files import write_atomically

Note = dict[str, Any]  # `clips`, `refusals`, and the shard's `bytes` and `sha256`.
_OWN = "note_sha256"  # The key of its own digest; earlier versions wrote none.


def identity(value: Any) -> str:
  """Returns a digest of a JSON value (files, settings). Equal values have equal digests."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write(path: epath.Path, note: Note) -> None:
  """Writes a note atomically."""
  write_atomically(path, json.dumps({**note, _OWN: identity(note)}).encode())


def read(path: epath.Path) -> Note | None:
  """Returns a note; None if there is none, or it is damaged."""
  if not path.exists():
    return None
  try:
    note = json.loads(path.read_bytes())
    own = note.pop(_OWN, None)
    complete = {"clips", "refusals", "bytes", "sha256"} <= note.keys()
  except (ValueError, AttributeError, TypeError, RecursionError):
    return None
  return note if complete and own in (None, identity(note)) else None
