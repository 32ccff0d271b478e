"""Whether a workdir may be gone on with: its config against the one now given; and its mixture."""

import json
from typing import Any

from etils import epath

from cogvideox_jax import hosts
from cogvideox_jax.config.read import read, to_json
from cogvideox_jax.config.schema import TrainConfig, VAETrainConfig
from cogvideox_jax.data import mixture
from cogvideox_jax.data.files import write_atomically
from cogvideox_jax.errors import UserError
from cogvideox_jax.version import __version__, name_writer

NAME, MIXTURE = "config.json", "mixture.json"
# Keys of that file beside those of the config: digests of the datasets by name, and the version of
# the package that wrote the file last.
DIGESTS, VERSION = "data_digests", "version"
# Keys that do not change what is trained beyond rounding, or are compared by other means.
FREE = (
  "log_every",
  "checkpoint",
  "preview",
  "mesh",
  "sharding",
  "cpu_devices",
  "remat",
  "data.path",
  "data.mixture",
)
MOST_LINES = 8  # Of changed keys in a message.


def check_config(workdir: epath.Path, config: TrainConfig | VAETrainConfig) -> None:
  """Raises a UserError if the workdir was begun with a config that trains something else.

  Names the keys, both values, and the way out.
  """
  if not (workdir / NAME).exists():
    return
  try:
    stored = json.loads((workdir / NAME).read_text())
  except ValueError as error:
    raise UserError(
      f"{workdir / NAME} is damaged ({error}).\nRestore it, or start in a new workdir."
    ) from error
  stored.pop(DIGESTS, None)
  version = stored.pop(VERSION, None)
  before, now = _flat(stored), _flat(json.loads(to_json(config)))
  changed = [
    f"  config.{key}: was {_text(before, key)}, is {_text(now, key)}"
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key) and not _is_free(key)
  ]
  if changed[MOST_LINES:]:
    changed[MOST_LINES - 1 :] = [f"  and {len(changed) - MOST_LINES + 1} more keys"]
  if changed:
    other_keys = any(not _is_free(key) for key in before.keys() ^ now.keys())
    writer = name_writer(version) if other_keys else ""
    lines = [f"{workdir} was begun with another config:", *changed, writer, _way_out(workdir)]
    raise UserError("\n".join(filter(None, lines)))


def read_config(folder: epath.Path) -> TrainConfig:
  """The config that `store` or `encode` wrote into a folder.

  Raises:
    UserError: it is damaged, or its keys are not those of this version; then the error names the
      version that wrote it.
  """
  path = folder / NAME
  try:
    fields = json.loads(path.read_text())
  except ValueError as error:
    raise UserError(f"{path} is damaged ({error}).\nRestore it.") from error
  fields.pop(DIGESTS, None)
  version = fields.pop(VERSION, None)
  try:
    return read(TrainConfig, fields)
  except UserError as error:
    raise UserError("\n".join(filter(None, [f"{path}: {error}", name_writer(version)]))) from error


def check_data(workdir: epath.Path, digests: dict[str, str]) -> None:
  """Raises a UserError if a dataset is not the one that the workdir knows by its name."""
  before = _digests(workdir)
  for name, digest in digests.items():
    if before.get(name, digest) != digest:
      raise UserError(
        f"{workdir} was begun on another dataset: the records of {name!r} are not the same as "
        "then.\nSet its path in config.data to the former one, or give a dataset of a mixture "
        f"another name, or{_way_out(workdir)[2:]}"
      )


def store(
  workdir: epath.Path, config: TrainConfig | VAETrainConfig, digests: dict[str, str]
) -> None:
  """Writes config.json: the config, digests of all datasets that it was trained on, the version."""
  digests = _digests(workdir) | digests
  fields = {**json.loads(to_json(config)), DIGESTS: digests, VERSION: __version__}
  write_atomically(workdir / NAME, (json.dumps(fields, indent=2) + "\n").encode())


def go_on_mixing(
  workdir: epath.Path, stage: str, weights: mixture.Weights, row: int
) -> mixture.History:
  """The mixture of a stage that goes on at a row of its own; kept in mixture.json, by stage.

  Raises:
    UserError: the file is damaged.
  """
  path = workdir / MIXTURE
  try:
    known = json.loads(path.read_text()) if path.exists() else {}
    kept = tuple(mixture.Stretch(**stretch) for stretch in known.get(stage, []))
  except (ValueError, TypeError, AttributeError) as error:
    raise UserError(
      f"{path} is damaged ({error}).\nRestore it: it says which rows the run has had."
    ) from error
  history = mixture.go_on(kept or mixture.begin(weights), weights, row)
  known[stage] = [stretch._asdict() for stretch in history]
  if hosts.is_first():
    write_atomically(path, (json.dumps(known) + "\n").encode())
  return history


def _digests(workdir: epath.Path) -> dict[str, str]:
  """By name, of all datasets that the workdir was ever trained on."""
  if not (workdir / NAME).exists():
    return {}
  return json.loads((workdir / NAME).read_text()).get(DIGESTS, {})


def _way_out(workdir: epath.Path) -> str:
  return (
    f"To train on from its weights with the new config, use a new --workdir and "
    f"--config.init_from={workdir}"
  )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  leaves: dict[str, Any] = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      leaves |= _flat(value, f"{prefix}{name}.")
    else:
      leaves[prefix + name] = value
  return leaves


def _is_free(key: str) -> bool:
  return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _text(leaves: dict[str, Any], key: str) -> str:
  return json.dumps(leaves[key]) if key in leaves else "absent"
