"""Checks a training config before any work: what is wrong is said at once, not after an hour.

Misspelt keys and wrong types are caught as the flags are read (command.py); what needs the data or
the devices, where those are known (data/loader.py, sharding.py).
"""

from collections.abc import Iterator, Sequence
from math import isfinite, lcm
from typing import Any

from ml_collections import ConfigDict

from cogvideox_jax.conversion import component_fields, diffusers
from cogvideox_jax.conversion.folder import TEXT_DROPS, open_model
from cogvideox_jax.data import buckets
from cogvideox_jax.diffusion.solvers import SOLVERS
from cogvideox_jax.errors import UserError
from cogvideox_jax.models import graphs, positions
from cogvideox_jax.models.dit import REMAT
from cogvideox_jax.models.vae import IMAGE_SCALES

CHOICES: dict[str, tuple[str, ...]] = {
  "dtype": graphs.DTYPES,
  "image.scale": IMAGE_SCALES,
  "model.positions": positions.RULES,
  "remat": tuple(REMAT),
  "text.drop": TEXT_DROPS,
  "train.growth": ("extrapolate", "interpolate"),
  "preview.solver": tuple(SOLVERS),
}
# Every number is above 0, but for these. The * stands for the name of any stage.
MAY_BE_ZERO = {
  "seed",
  "data.clips",
  "image.log_sigma_std",
  "model.ofs_width",
  "optimizer.warmup_steps",
  "optimizer.weight_decay",
  "preview.every",
  "preview.guidance_scale",
  "stages.*.learning_rate",
  "stages.*.rows_at_once",
  "validation.every",
}
FRACTIONS = {
  "data.validation_fraction",
  "image.drop_rate",
  "optimizer.b1",
  "optimizer.b2",
  "optimizer.ema_decay",
  "optimizer.final_fraction",
  "text.drop_rate",
}
ANY_NUMBER = {"image.log_sigma_mean"}
MIXTURE = "data.mixture"
MESH = "mesh."  # Along one axis, -1 stands for all devices that are left.


def check(config: ConfigDict, model: str) -> None:
  """Refuses a config of the transformer's training that cannot work.

  Args:
    config: has the keys of configs/base.py.
    model: whose VAE the clips go through, a shipped name or a folder; "": not known, so that sizes
      are checked against the patches alone.

  Raises:
    UserError: names the key, its value and what it may be.
  """
  check_values(config)
  if [axis for axis, size in config.mesh.items() if size == -1][1:]:
    raise UserError(f"config.mesh is {dict(config.mesh)}: only one axis may be -1.")
  compression = _spatial_compression(model) if model else 1
  multiple = lcm(*config.model.patch[1:]) * compression
  if not config.stages:
    raise UserError("config.stages is empty: nothing says what to train on.")
  _check_mixture(config)
  for name, stage in config.stages.items():
    _check_stage(f"config.stages.{name}", stage, multiple)
    _check_source(name, config.stages)
  if config.preview.every:
    size, num_frames = (config.preview.height, config.preview.width), config.preview.num_frames
    _check_buckets("config.preview", [size], [num_frames], multiple)
  _check_images(config)
  if config.model.learned_positions and model:
    _check_learned_positions(config, compression)


def check_values(config: ConfigDict) -> None:
  """Raises UserError for the first value of any config that is out of its range."""
  for key, value in leaves(config):
    _check_value(key, value)


def _pattern(key: str) -> str:
  """A key with * for the name of its stage."""
  first, *rest = key.split(".")
  return ".".join([first, "*", *rest[1:]]) if first == "stages" else key


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Every value with its dotted key; the items of a tuple one by one, under the tuple's key."""
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from leaves(value, f"{prefix}{name}.")
    else:
      yield from ((prefix + name, item) for item in _items(value))


def _items(value: Any) -> Iterator[Any]:
  if isinstance(value, Sequence) and not isinstance(value, str):
    for item in value:
      yield from _items(item)
  else:
    yield value


def _check_value(key: str, value: Any) -> None:
  if key in CHOICES and value not in CHOICES[key]:
    raise UserError(f"config.{key} is {value!r}; it must be one of {', '.join(CHOICES[key])}.")
  if isinstance(value, bool | str):
    return
  if key == "mesh.context" and value == 0:
    return
  if key.startswith(MESH):
    fits, wanted = value == -1 or value >= 1, "at least 1, or -1 for all devices that are left"
  elif key in FRACTIONS:
    fits, wanted = 0 <= value <= 1, "from 0 to 1"
  elif key in ANY_NUMBER:
    fits, wanted = isfinite(value), "finite"
  elif _pattern(key) in MAY_BE_ZERO or key.startswith(MIXTURE):
    fits, wanted = 0 <= value < float("inf"), "at least 0"
  else:
    fits, wanted = 0 < value < float("inf"), "above 0"
  if not fits:
    raise UserError(f"config.{key} is {value}; it must be {wanted}.")


def _check_mixture(config: ConfigDict) -> None:
  sources = config.data.mixture.items()
  for name, source in sources:
    if set(source) != {"path", "weight"} or not source.path:
      raise UserError(
        f"config.{MIXTURE}.{name} must have a path and a weight: write base.source(path, weight)."
      )
  if sources and config.data.path:
    raise UserError(f"config.data.path and config.{MIXTURE} are both given; leave one out.")
  if sources and not any(source.weight for _, source in sources):
    raise UserError(f"config.{MIXTURE}: no dataset has a weight above 0.")


def _check_stage(name: str, stage: ConfigDict, multiple: int) -> None:
  if not stage.durations or not all(type(frames) is int for frames in stage.durations):
    raise UserError(
      f"{name}.durations is {stage.durations}; it must hold numbers of frames, such as (1, 9, 17)."
    )
  if not stage.sizes or not all(_is_size(size) for size in stage.sizes):
    raise UserError(
      f"{name}.sizes is {stage.sizes}; it must hold (height, width) pairs of pixels, such as "
      "((64, 64), (48, 80))."
    )
  _check_buckets(name, stage.sizes, stage.durations, multiple)


def _check_source(name: str, stages: ConfigDict) -> None:
  """Of a stage that reads the clips of another."""
  stage, key = stages[name], f"config.stages.{name}"
  if stage.best > 1:
    raise UserError(f"{key}.best is {stage.best}; it must be a fraction, above 0 and at most 1.")
  if not stage.data:
    return
  own = sorted(other for other in stages if not stages[other].data)
  if stage.data not in own:
    raise UserError(
      f"{key}.data is {stage.data!r}; it must be empty, for clips of its own, or name a stage that "
      f"has some: {', '.join(own) or 'there is none'}."
    )
  for part in ("sizes", "durations"):
    if stage[part] != stages[stage.data][part]:
      raise UserError(
        f"{key}.{part} is {stage[part]}, but it reads the clips of {stage.data}, whose {part} are "
        f"{stages[stage.data][part]}.\nMake them the same, or give it clips of its own: data ''."
      )


def _is_size(size: Any) -> bool:
  return isinstance(size, Sequence) and [type(side) for side in size] == [int, int]


def _check_buckets(name: str, sizes: Any, durations: Any, multiple: int) -> None:
  try:
    buckets.check(sizes, durations, multiple_of=multiple)
  except UserError as error:
    raise UserError(f"{name}: {error}") from error


def _check_images(config: ConfigDict) -> None:
  channels, latents = config.model.in_channels, config.model.out_channels
  if channels not in (latents, 2 * latents):
    raise UserError(
      f"config.model.in_channels is {channels}; it must be out_channels, {latents}, or for a model "
      f"that sees an image twice that, {2 * latents}."
    )
  files, prompts = len(config.preview.images), len(config.preview.prompts)
  wanted = prompts if channels > latents else 0
  if config.preview.every and files != wanted:
    raise UserError(
      f"config.preview.images names {files} files; it must name {wanted}: one for each of "
      "config.preview.prompts if the model sees an image (config.model.in_channels), else none."
    )


def _check_learned_positions(config: ConfigDict, compression: int) -> None:
  """They are a table for clips of the sample size alone."""
  model, preview = config.model, config.preview
  if model.patch[0] > 1:
    raise UserError("config.model.learned_positions needs a config.model.patch of 1 in time.")
  frames = model.sample_frames
  height, width = model.sample_height * compression, model.sample_width * compression
  given = [
    (f"config.stages.{name}", stage.durations, stage.sizes) for name, stage in config.stages.items()
  ]
  if preview.every and preview.prompts:
    given.append(("config.preview", (preview.num_frames,), ((preview.height, preview.width),)))
  for where, durations, sizes in given:
    if set(durations) != {frames} or set(map(tuple, sizes)) != {(height, width)}:
      raise UserError(
        f"{where} has clips of {durations} frames and {sizes} (height, width) pixels, but the "
        f"model has learned positions, which fix them to {frames} frames of {height}x{width}.\n"
        "Give this duration and size alone, or set config.model.learned_positions=False."
      )


def _spatial_compression(model: str) -> int:
  fields, where = diffusers.read_fields(open_model(model).path / "vae", "config.json")
  return component_fields.read_vae(fields, where).spatial_compression
