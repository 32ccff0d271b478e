"""Checks that what encoded the datasets of a run is what the run's model will be sampled with.

With another VAE of the same shape training would run, and its videos would come out of the wrong
decoder.
"""

import json
from collections.abc import Iterable
from typing import NamedTuple

from etils import epath

from cogvideox_jax import hosts
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.conversion import component_digests
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.data.encoded_by import EncodedBy
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.errors import UserError
from cogvideox_jax.version import __version__

SHOWN = 12  # Digits of a digest in a message.
NETWORKS = {"vae": "VAE", "text_encoder": "text encoder", "tokenizer": "tokenizer"}


class Found(NamedTuple):
  """What a dataset says about what encoded it."""

  directory: epath.Path
  encoded_by: EncodedBy


def check(config: TrainConfig, datasets: Iterable[Dataset]) -> list[str]:
  """Compares what encoded each dataset with `config.components` and `config.data.fps`.

  Every process of a job calls this. The first one reads the weights, for all.

  Returns:
    Lines to print: what differs without harm, and what cannot be checked.

  Raises:
    UserError: a dataset was encoded by other networks, or at another rate; it names both.
  """
  known, unknown = [], []
  for dataset in datasets:
    if dataset.encoded_by is None:
      unknown.append(str(dataset.directory))
    else:
      known.append(Found(dataset.directory, dataset.encoded_by))
  lines = []
  if unknown:
    lines.append(
      f"It is not known which VAE and text encoder encoded {', '.join(sorted(unknown))} (by an "
      "earlier version): whether they are those of config.components cannot be checked."
    )
  if not known:
    return lines
  ours = _ours(config)
  for found in known:
    _compare(found, ours)
  return [*lines, *(line for found in known for line in _harmless(found, ours))]


def _ours(config: TrainConfig) -> EncodedBy:
  text = ""
  if hosts.is_first():
    found = component_digests.describe(
      open_model(config.components), config.components, config.text.drop, config.data.fps
    )
    text = json.dumps(found)
  return EncodedBy(*json.loads(hosts.each(text)[0]))


def _compare(found: Found, ours: EncodedBy) -> None:
  directory, theirs = found
  for name, title in NETWORKS.items():
    there, here = getattr(theirs, name), getattr(ours, name)
    if there and here and there != here:
      raise UserError(
        f"The clips of {directory} were encoded by another {title} than that of "
        "config.components.\n"
        f"  the clips: {theirs.model}, sha256 {there[:SHOWN]}\n"
        f"  config.components: {ours.model}, sha256 {here[:SHOWN]}\n"
        "Give the model that encoded them as --config.components=MODEL, or encode the clips again "
        "with\n"
        f"--model={ours.model} into another folder."
      )
  if theirs.scaling_factor != ours.scaling_factor:
    raise UserError(
      f"The VAE that encoded the clips of {directory} ({theirs.model}) has the scaling factor\n"
      f"{theirs.scaling_factor}, that of config.components ({ours.model}) has "
      f"{ours.scaling_factor}.\n"
      "Restore scaling_factor in the config.json of the VAE that was changed, or give the model "
      "that\nencoded the clips as --config.components=MODEL."
    )
  if theirs.fps != ours.fps:
    raise UserError(
      f"The clips of {directory} have {theirs.fps:g} frames a second, but config.data.fps is "
      f"{ours.fps:g}.\nGive --config.data.fps={theirs.fps:g}, or encode them again into another "
      "folder."
    )


def _harmless(found: Found, ours: EncodedBy) -> list[str]:
  directory, theirs = found
  lines = []
  unchecked = [title for name, title in NETWORKS.items() if not (getattr(ours, name))]
  if unchecked:
    lines.append(
      f"{ours.model} has no weights of its {' and '.join(unchecked)}: whether they encoded "
      f"{directory} cannot be checked."
    )
  if theirs.text_drop != ours.text_drop:
    lines.append(
      f"{directory} was encoded with config.text.drop {theirs.text_drop}, now it is "
      f"{ours.text_drop}: training uses {ours.text_drop}, which its samples need, too."
    )
  if theirs.version != __version__:
    lines.append(
      f"{directory} was encoded by version {theirs.version or 'before 0.2'} of cogvideox_jax; this "
      f"is version {__version__}."
    )
  return lines
