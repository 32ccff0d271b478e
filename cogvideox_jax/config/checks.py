"""Checks a config before any work, so that a mistake is reported at once and not after an hour.

Misspelt keys and wrong types are reported when the flags are read (command.py) and when the config
is converted (read.py). What needs the data or the devices is checked where those are known
(data/loader.py, sharding.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import lcm
from typing import Any

from cogvideox_jax.config.read import Leaf, leaves
from cogvideox_jax.config.schema import DataConfig, StageConfig, TrainConfig
from cogvideox_jax.conversion import component_fields, diffusers
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.data import buckets
from cogvideox_jax.errors import UserError

MIXTURE = "config.data.mixture"


def check(config: TrainConfig, model: str) -> None:
  """Refuses a config of the transformer's training that cannot work.

  Args:
    model: a shipped name or a folder of the model whose VAE encodes the clips. Empty: it is not
      known, and sizes are checked against the patches only.

  Raises:
    UserError: names the key, its value and what it may be.
  """
  check_values(config)
  mesh = asdict(config.mesh)
  if [axis for axis, size in mesh.items() if size == -1][1:]:
    raise UserError(f"config.mesh is {mesh}: only one axis may be -1.")
  compression = _spatial_compression(model) if model else 1
  multiple = lcm(*config.model.patch[1:]) * compression
  if not config.stages:
    raise UserError("config.stages is empty: nothing says what to train on.")
  _check_mixture(config.data)
  for name, stage in config.stages.items():
    _check_buckets(f"config.stages.{name}", stage.sizes, stage.durations, multiple)
    _check_source(name, config.stages)
  if config.preview.every:
    size, num_frames = (config.preview.height, config.preview.width), config.preview.num_frames
    _check_buckets("config.preview", [size], [num_frames], multiple)
  _check_images(config)
  if config.model.learned_positions and model:
    _check_learned_positions(config, compression)


def check_values(config: Any) -> None:
  """Raises a UserError for the first value of a typed config that is out of its range."""
  for leaf in leaves(config):
    for value in _items(leaf.value):
      _check_value(leaf, value)


def _items(value: Any) -> Iterator[Any]:
  """The value, or the items of a tuple, however deep."""
  if isinstance(value, tuple):
    for item in value:
      yield from _items(item)
  else:
    yield value


def _check_value(leaf: Leaf, value: Any) -> None:
  key = leaf.key
  if key.choices and value not in key.choices:
    raise UserError(f"{leaf.name} is {value!r}; it must be one of {', '.join(key.choices)}.")
  if isinstance(value, bool | str):
    return
  if not key.allowed.contains(value):
    raise UserError(f"{leaf.name} is {value}; it must be {key.allowed.wanted}.")


def _check_mixture(data: DataConfig) -> None:
  sources = data.mixture
  for name, source in sources.items():
    if not source.path:
      raise UserError(
        f"{MIXTURE}.{name} must have a path and a weight: write base.source(path, weight)."
      )
  if sources and data.path:
    raise UserError(f"config.data.path and {MIXTURE} are both given; leave one out.")
  if sources and not any(source.weight for source in sources.values()):
    raise UserError(f"{MIXTURE}: no dataset has a weight above 0.")


def _check_source(name: str, stages: Mapping[str, StageConfig]) -> None:
  """Checks a stage that reads the clips of another one: both must have the same buckets."""
  stage, key = stages[name], f"config.stages.{name}"
  if not stage.data:
    return
  own = sorted(other for other in stages if not stages[other].data)
  if stage.data not in own:
    raise UserError(
      f"{key}.data is {stage.data!r}; it must be empty, for clips of its own, or name a stage that "
      f"has some: {', '.join(own) or 'there is none'}."
    )
  source = stages[stage.data]
  for what, mine, wanted in (
    ("sizes", stage.sizes, source.sizes),
    ("durations", stage.durations, source.durations),
  ):
    if mine != wanted:
      raise UserError(
        f"{key}.{what} is {mine}, but it reads the clips of {stage.data}, whose {what} are "
        f"{wanted}.\nMake them the same, or give it clips of its own: data ''."
      )


def _check_buckets(
  name: str, sizes: Sequence[tuple[int, int]], durations: Sequence[int], multiple: int
) -> None:
  try:
    buckets.check(sizes, durations, multiple_of=multiple)
  except UserError as error:
    raise UserError(f"{name}: {error}") from error


def _check_images(config: TrainConfig) -> None:
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
  if channels > latents:
    _check_durations(config.stages)


def _check_durations(stages: Mapping[str, StageConfig]) -> None:
  """A model that sees an image has nothing to learn from a clip that is this image."""
  for name, stage in stages.items():
    if 1 in stage.durations:
      raise UserError(
        f"config.stages.{name}.durations is {stage.durations}, but config.model sees an image: a "
        "clip of\none frame would be its own image. Leave 1 out."
      )


def _check_learned_positions(config: TrainConfig, compression: int) -> None:
  """Learned positions are a table for the sample size, so all clips must have that size."""
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
    if set(durations) != {frames} or set(sizes) != {(height, width)}:
      raise UserError(
        f"{where} has clips of {durations} frames and {sizes} (height, width) pixels, but the "
        f"model has learned positions, which fix them to {frames} frames of {height}x{width}.\n"
        "Give this duration and size alone, or set config.model.learned_positions=False."
      )


def _spatial_compression(model: str) -> int:
  fields, where = diffusers.read_fields(open_model(model).path / "vae", "config.json")
  return component_fields.read_vae(fields, where).spatial_compression
