"""What encoded a dataset: `encoded_by.json` in its folder.

Latents mean nothing to another VAE, and text states nothing to a transformer that was trained with
another text encoder. So a dataset remembers both, and training compares them with its own.
"""

import json
from typing import NamedTuple

from etils import epath

from cogvideox_jax.data.files import write_atomically
from cogvideox_jax.errors import UserError

NAME = "encoded_by.json"


class EncodedBy(NamedTuple):
  """The frozen networks that encoded a dataset, and the settings that they were used with.

  A digest is a sha256 of the weights' values; it does not depend on the file or the type that holds
  them. It is None if it is not known.
  """

  model: str  # As `encode --model` named it.
  vae: str | None
  text_encoder: str | None
  tokenizer: str | None
  scaling_factor: float  # The VAE's. Latents are stored without it.
  text_drop: str  # config.text.drop.
  fps: float  # Frames a second.
  version: str | None  # The package's version; None: an earlier one, which did not write this file.

  @property
  def networks(self) -> tuple[str | None, ...]:
    return self.vae, self.text_encoder, self.tokenizer


def write(folder: epath.Path, encoded_by: EncodedBy) -> None:
  """Writes the file of a dataset's folder."""
  write_atomically(folder / NAME, (json.dumps(encoded_by._asdict(), indent=2) + "\n").encode())


def read(folder: epath.Path) -> EncodedBy | None:
  """Returns what the file of a dataset's folder says; None if there is no file.

  Raises:
    UserError: it is damaged.
  """
  path = folder / NAME
  if not path.exists():
    return None
  try:
    return EncodedBy(**json.loads(path.read_bytes()))
  except (ValueError, TypeError) as error:
    raise UserError(
      f"{path} is damaged ({error}).\nDelete it: the same encode command writes it again."
    ) from error
