"""Compares what the weights of `config.init_from` were trained for with what the config says.

Arrays of the same shapes may belong to other positions, another noise schedule, another dropped
caption or another scale of latents. Training would then begin with a network that is wrong in every
prediction, and nothing in the metrics would say so.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.conversion import component_fields, diffusers
from cogvideox_jax.conversion.folder import INDEX, SETTINGS, ModelFolder, open_model
from cogvideox_jax.diffusion.noise import NoiseConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.vae_config import VAEConfig
from cogvideox_jax.training import checkpoint, stages
from cogvideox_jax.training.resume import CONFIG_FILE, read_config
from cogvideox_jax.training.session import say

SOURCE, CONFIG = "source", "config"  # Whose facts a training keeps, where they differ.
POSITIONS = ("positions", "spatial_interpolation", "temporal_interpolation")
SAMPLE_SIZE = ("sample_frames", "sample_height", "sample_width")


class Source(NamedTuple):
  """What is known of the weights that a training begins with; None is not known."""

  model: DiTConfig  # With the positions of the stage that trained the weights.
  noise: NoiseConfig | None
  text_drop: str | None
  image_scale: str | None
  vae: VAEConfig | None


def settle(config: TrainConfig, workdir: epath.Path) -> TrainConfig:
  """Returns the config that a training follows: `config`, or with the facts of its source.

  A workdir that was begun keeps the facts that it was begun with.

  Raises:
    UserError: the source's facts are not those of the config, and `config.init.keep` does not say
      which hold; or they cannot be had together.
  """
  keep = config.init.keep
  if not config.init_from:
    if keep:
      raise UserError(f"config.init.keep is {keep!r}, but config.init_from names no weights.")
    return config
  if (workdir / CONFIG_FILE).exists():
    return _with_begun(config, read_config(workdir)) if keep == SOURCE else config
  source = read_source(config.init_from)
  settled = _with_facts(config, source) if keep == SOURCE else config
  if lines := differences(settled, source):
    told = "\n".join(
      [f"config.init_from={config.init_from} was trained for other numbers:", *lines]
    )
    if keep != CONFIG:
      raise UserError(f"{told}\n{_ways_out(keep)}")
    say(f"{told}\nThe training goes on with those of the config.")
  return settled


def read_source(name: str) -> Source:
  """Reads the facts of a workdir's newest good checkpoint, or of a model folder.

  Raises:
    UserError: there is no such model, or a file of it is damaged.
  """
  path = epath.Path(name)
  if (path / "checkpoints").is_dir():
    config = read_config(path)
    last = stages.trained_last(stages.plan(config), checkpoint.open_weights(path).step)
    model = stages.stage_model(config, last.name)
    vae = _vae(config.components)
    return Source(model, config.noise, config.text.drop, config.image.scale, vae)
  folder = open_model(name)
  model = folder.open("transformer")[0]
  noise = folder.scheduler() if (folder.path / "scheduler").is_dir() else None
  stated = _stated_settings(folder)
  return Source(model, noise, stated.get("text_drop"), stated.get("image_scale"), _vae(name))


def differences(config: TrainConfig, source: Source) -> list[str]:
  """Returns a line for each fact that the source states and the config does not share."""
  first = stages.plan(config)[0].name
  ours = _facts(
    Source(
      stages.stage_model(config, first),
      config.noise,
      config.text.drop,
      config.image.scale,
      _vae(config.components),
    )
  )
  theirs = _facts(source)
  return [
    f"  {key}: {theirs[key]!r} there, {ours[key]!r} here"
    for key in theirs
    if key in ours and not _equal(theirs[key], ours[key])
  ]


def _facts(source: Source) -> dict[str, Any]:
  """Returns the facts that change what a network computes or learns, by their keys in a config."""
  model = source.model
  facts = {f"config.model.{name}": getattr(model, name) for name in ("patch", "positions")}
  if model.positions in ("sincos", "rope_scaled"):
    facts |= {f"config.model.{name}": getattr(model, name) for name in POSITIONS[1:]}
  if _is_sized(model):
    facts |= {f"config.model.{name}": getattr(model, name) for name in SAMPLE_SIZE}
  if source.noise:
    facts |= {f"config.noise.{name}": x for name, x in _schedule(source.noise).items()}
  if source.text_drop:
    facts["config.text.drop"] = source.text_drop
  if source.vae:
    facts["scaling factor of the VAE in config.components"] = source.vae.scaling_factor
    if model.takes_image and source.image_scale:
      facts["factor of the image by config.image.scale"] = source.vae.image_scale(
        source.image_scale
      )
  return facts


def _is_sized(model: DiTConfig) -> bool:
  """Returns whether positions depend on the sample size, which otherwise is only a default."""
  return model.positions == "rope" or model.learned_positions


def _schedule(noise: NoiseConfig) -> dict[str, Any]:
  """Returns the fields of a schedule that training depends on, not those of samplers alone."""
  names = ("steps", "beta_start", "beta_end", "snr_shift", "zero_terminal_snr", "prediction")
  return {name: getattr(noise, name) for name in names}


def _with_facts(config: TrainConfig, source: Source) -> TrainConfig:
  """Returns the config with every fact that the source states and a config can hold."""
  names = (*POSITIONS, *(SAMPLE_SIZE if _is_sized(source.model) else ()), "patch")
  model = dataclasses.replace(config.model, **{name: getattr(source.model, name) for name in names})
  changed = dataclasses.replace(config, model=model)
  if source.noise:
    noise = dataclasses.replace(config.noise, **_schedule(source.noise))
    changed = dataclasses.replace(changed, noise=noise)
  if source.text_drop:
    text = dataclasses.replace(config.text, drop=source.text_drop)
    changed = dataclasses.replace(changed, text=text)
  if source.image_scale:
    image = dataclasses.replace(config.image, scale=source.image_scale)
    changed = dataclasses.replace(changed, image=image)
  return changed


def _with_begun(config: TrainConfig, begun: TrainConfig) -> TrainConfig:
  """Returns the config with the facts that its workdir was begun with."""
  return _with_facts(
    config, Source(begun.model, begun.noise, begun.text.drop, begun.image.scale, None)
  )


def _stated_settings(folder: ModelFolder) -> Mapping[str, Any]:
  """Returns the settings that the index of a model folder states; the published ones have none."""
  if not (folder.path / INDEX).exists():
    return {}
  return diffusers.read_fields(folder.path, INDEX)[0].get(SETTINGS, {})


def _vae(components: str) -> VAEConfig | None:
  """Returns the config of a model's VAE; None if there is none."""
  if not components or not (folder := open_model(components).path / "vae").is_dir():
    return None
  return component_fields.read_vae(*diffusers.read_fields(folder, diffusers.CONFIG))


def _equal(one: Any, other: Any) -> bool:
  if isinstance(one, float) or isinstance(other, float):
    return math.isclose(one, other, rel_tol=1e-6)
  return one == other


def _ways_out(keep: str) -> str:
  if keep == SOURCE:
    return "Give config.components the model whose latents the weights were trained on."
  return (
    "Give --config.init.keep=source to train with its numbers, --config.init.keep=config to change "
    "them on purpose."
  )
