"""Checks that a workdir goes on with the config and data that it was begun with; records both."""

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

CONFIG_FILE, MIXTURE_FILE = "config.json", "mixture.json"
# The keys in config.json beside those of the config: the digests of the datasets by name, and the
# version of the package that wrote the file last.
DIGESTS_KEY, VERSION_KEY = "data_digests", "version"
# Keys that may change: they change no result beyond rounding, or are compared by other means.
FREE_KEYS = (
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
LISTED_KEYS = 8  # The most changed keys that a message lists.


def check_config(workdir: epath.Path, config: TrainConfig | VAETrainConfig) -> None:
  """Raises a UserError if the workdir was begun with a config that trains something else.

  The message names the keys, both values, and the way out.
  """
  path = workdir / CONFIG_FILE
  if not path.exists():
    return
  stored = read_fields(path, "Restore it, or start in a new workdir.")
  stored.pop(DIGESTS_KEY, None)
  version = stored.pop(VERSION_KEY, None)
  before, now = _flat(stored), _flat(json.loads(to_json(config)))
  if changed := _changed_lines(before, now):
    other_keys = any(not _is_free(key) for key in before.keys() ^ now.keys())
    writer = name_writer(version) if other_keys else ""
    lines = [f"{workdir} was begun with another config:", *changed, writer, _way_out(workdir)]
    raise UserError("\n".join(filter(None, lines)))


def read_fields(path: epath.Path, way_out: str) -> Any:
  """Returns what a config.json holds.

  Args:
    way_out: what to do if the file is damaged, the end of the message.

  Raises:
    UserError: it is damaged.
  """
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise UserError(f"{path} is damaged ({error}).\n{way_out}") from error


def read_config(folder: epath.Path) -> TrainConfig:
  """Returns the config that `store` or `encode` wrote into a folder.

  Raises:
    UserError: it is damaged, or its keys are not those of this version; then the error names the
      version that wrote it.
  """
  path = folder / CONFIG_FILE
  fields = read_fields(path, "Restore it.")
  fields.pop(DIGESTS_KEY, None)
  version = fields.pop(VERSION_KEY, None)
  try:
    return read(TrainConfig, fields)
  except UserError as error:
    raise UserError("\n".join(filter(None, [f"{path}: {error}", name_writer(version)]))) from error


def check_data(workdir: epath.Path, digests: dict[str, str]) -> None:
  """Raises a UserError if a dataset differs from the one that the workdir knows by the same name.

  Args:
    digests: the digest of each dataset by its name.
  """
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
  fields = {**json.loads(to_json(config)), DIGESTS_KEY: digests, VERSION_KEY: __version__}
  write_atomically(workdir / CONFIG_FILE, (json.dumps(fields, indent=2) + "\n").encode())


def go_on_mixing(
  workdir: epath.Path, stage: str, weights: mixture.Weights, row: int
) -> mixture.History:
  """Returns the history of a stage's mixture, and records it in mixture.json.

  Args:
    weights: those from `row` on.
    row: the next row of the stage, counted from its first one.

  Raises:
    UserError: the file is damaged.
  """
  path = workdir / MIXTURE_FILE
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
  """Returns by name the digests of all datasets that the workdir was ever trained on."""
  if not (workdir / CONFIG_FILE).exists():
    return {}
  return json.loads((workdir / CONFIG_FILE).read_text()).get(DIGESTS_KEY, {})


def _way_out(workdir: epath.Path) -> str:
  return (
    f"To train on from its weights with the new config, use a new --workdir and "
    f"--config.init_from={workdir}"
  )


def _changed_lines(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """Returns a line for each key that differs and may not, but at most LISTED_KEYS lines."""
  changed = [
    f"  config.{key}: was {_text(before, key)}, is {_text(now, key)}"
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key) and not _is_free(key)
  ]
  if changed[LISTED_KEYS:]:
    changed[LISTED_KEYS - 1 :] = [f"  and {len(changed) - LISTED_KEYS + 1} more keys"]
  return changed


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns the values of nested dictionaries by their keys, joined by dots."""
  leaves: dict[str, Any] = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      leaves |= _flat(value, f"{prefix}{name}.")
    else:
      leaves[prefix + name] = value
  return leaves


def _is_free(key: str) -> bool:
  return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def _text(leaves: dict[str, Any], key: str) -> str:
  return json.dumps(leaves[key]) if key in leaves else "absent"
