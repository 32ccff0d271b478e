"""Checks that a workdir goes on with the config and data that it was begun with; records both."""

import dataclasses
import json
import os
import re
from typing import Any, TypeVar

from etils import epath

from cogvideox_jax import hosts
from cogvideox_jax.config.locations import absolute_text, path_keys
from cogvideox_jax.config.older import Newer, describe, newer_keys, with_values, without
from cogvideox_jax.config.read import read, to_dict, to_json
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.config.stored import DIGESTS_KEY, VERSION_KEY
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.config_keys import Key
from cogvideox_jax.data import mixture
from cogvideox_jax.data.files import write_atomically
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import checkpoint, stages
from cogvideox_jax.version import __version__, name_writer

CONFIG_FILE, MIXTURE_FILE = "config.json", "mixture.json"
# Keys that may change: they change no result beyond rounding, or are compared by other means.
FREE_KEYS = (
  "log_every",
  "checkpoint",
  "guard",
  "watchdog",
  "preview",
  "mesh",
  "sharding",
  "cpu_devices",
  "remat",
  "data.path",
  "data.mixture",
  "data.limits",
)
STEPS_KEY = "train.steps"
LISTED_KEYS = 8  # The most changed keys that a message lists.
_Config = TypeVar("_Config", TrainConfig, VAETrainConfig)


def with_former_keys(workdir: epath.Path, config: _Config) -> tuple[_Config, str]:
  """Returns the config that goes on with a workdir of any version, and a line about what is newer.

  A key that the workdir's version did not have keeps what that version did, whatever the config
  says. The line is empty if the workdir is new or has every key.
  """
  if not (workdir / CONFIG_FILE).exists():
    return config, ""
  newer = _newer_keys(workdir, type(config))
  if not newer:
    return config, ""
  changed = read(type(config), with_values(to_dict(config), newer))
  return changed, describe(workdir, newer)


def older_line(workdir: epath.Path) -> str:
  """Returns a line about the keys that the config of a workdir lacks; empty if it has all."""
  newer = _newer_keys(workdir, TrainConfig)
  return describe(workdir, newer) if newer else ""


def _newer_keys(workdir: epath.Path, schema: type) -> list[Newer]:
  stored = read_fields(workdir / CONFIG_FILE, "Restore it, or start in a new workdir.")
  return [key for key in newer_keys(schema, stored) if not _is_free(".".join(key.path))]


def check_config(workdir: epath.Path, config: TrainConfig | VAETrainConfig) -> int:
  """Raises a UserError if the workdir was begun with a config that trains something else.

  The message names the keys, both values, and the way out. A run may be lengthened: train.steps may
  grow, and the shares of its stages may change with it.

  Returns:
    The steps that the run had before; those of the config if it is new.
  """
  path = workdir / CONFIG_FILE
  if not path.exists():
    if good := checkpoint.good_steps(workdir / "checkpoints"):
      raise UserError(
        f"{workdir} has a checkpoint of step {good[-1]}, but no {CONFIG_FILE}, which says what it "
        f"trains.\nRestore the file. {_way_out(workdir)}."
      )
    return config.train.steps
  stored = read_fields(path, "Restore it, or start in a new workdir.")
  stored.pop(DIGESTS_KEY, None)
  version = stored.pop(VERSION_KEY, None)
  stored = with_values(stored, newer_keys(type(config), stored))
  before, now = _flat(stored), _flat(json.loads(to_json(config)))
  for name, key in path_keys(config).items():
    if name in before and _is_same_path(before[name], now[name], key):
      before[name] = now[name]
  steps = before.get(STEPS_KEY)
  if isinstance(steps, int) and steps < config.train.steps:
    before |= {key: now[key] for key in before if key in now and _may_be_lengthened(key)}
  if changed := _changed_lines(before, now):
    other_keys = any(not _is_free(key) for key in before.keys() ^ now.keys())
    writer = name_writer(version) if other_keys else ""
    lines = [f"{workdir} was begun with another config:", *changed, writer, _way_out(workdir)]
    raise UserError("\n".join(filter(None, lines)))
  if isinstance(config, TrainConfig):
    _check_stages(workdir, config, stored)
  return steps if isinstance(steps, int) else config.train.steps


def _may_be_lengthened(key: str) -> bool:
  """Returns whether a key may change when a run gets more steps."""
  return key == STEPS_KEY or re.fullmatch(r"stages\.[^.]+\.share", key) is not None


def _check_stages(workdir: epath.Path, config: TrainConfig, stored: dict[str, Any]) -> None:
  """Raises a UserError if a lengthened run would begin a stage elsewhere that it has begun."""
  done = (checkpoint.good_steps(workdir / "checkpoints") or [0])[-1]
  shares = {name: stored["stages"][name]["share"] for name in config.stages}
  former = dataclasses.replace(
    config,
    train=dataclasses.replace(config.train, steps=stored["train"]["steps"]),
    stages={name: dataclasses.replace(config.stages[name], share=shares[name]) for name in shares},
  )
  plans = stages.plan(former), stages.plan(config)
  if any(old.start < done and old.start != new.start for old, new in zip(*plans, strict=True)):
    added = config.train.steps - former.train.steps
    wanted = {stage.name: stage.steps for stage in plans[0]}
    wanted[plans[0][-1].name] += added
    flags = " ".join(f"--config.stages.{name}.share={share}" for name, share in wanted.items())
    raise UserError(
      f"config.train.steps was {former.train.steps} and is {config.train.steps}. This moves stages "
      f"that have begun by step {done}.\nThe last stage alone is lengthened with\n  {flags}"
    )


def read_fields(path: epath.Path, way_out: str) -> Any:
  """Returns what a config.json holds.

  Args:
    way_out: what to do if the file is damaged, the end of the message.

  Raises:
    UserError: it is damaged.
  """
  try:
    return json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError) as error:
    raise UserError(f"There is no {path}.\n{way_out}") from error
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
  """Writes config.json: the config, digests of all datasets that it was trained on, the version.

  The keys that an older workdir lacks stay out of it, so that each later start knows them as such.
  """
  values = json.loads(to_json(config))
  if (workdir / CONFIG_FILE).exists():
    values = without(values, _newer_keys(workdir, type(config)))
  digests = _digests(workdir) | digests
  fields = {**values, DIGESTS_KEY: digests, VERSION_KEY: __version__}
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


def _is_same_path(before: Any, now: Any, key: Key) -> bool:
  """Returns whether a path of the stored config is now another way to write the same one.

  Earlier versions stored paths as they were given. An absolute path that is gone was moved if its
  last part is the same.
  """
  if not (isinstance(before, str) and isinstance(now, str) and before and now):
    return before == now
  if absolute_text(before, key) == now:
    return True
  old, new = epath.Path(before), epath.Path(now)
  return os.path.isabs(old) and old.name == new.name and not old.exists() and new.exists()


def _is_free(key: str) -> bool:
  return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def _text(leaves: dict[str, Any], key: str) -> str:
  return json.dumps(leaves[key]) if key in leaves else "absent"
