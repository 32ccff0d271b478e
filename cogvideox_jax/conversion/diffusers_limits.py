"""Fits a model to what diffusers' layout can say, and names what it cannot say.

diffusers derives positions from the sample size alone, encodes the empty prompt for guidance, and
has two scales for an image's latents. What differs is expressed in other fields where that gives
the same numbers at the sample size; else the export is refused.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cogvideox_jax.conversion import component_fields
from cogvideox_jax.conversion.folder import SETTINGS, Settings
from cogvideox_jax.conversion.model_contents import Model, Network
from cogvideox_jax.conversion.tensors import Layer, Lazy
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.positions import rotary_positions
from cogvideox_jax.models.vae_config import VAEConfig
from cogvideox_jax.sharding import path_name

TEXT_LENGTH = 226  # diffusers' default of max_sequence_length.
# Positions that differ less are the same: they are at most some hundred, and rounding is far below.
_TOLERANCE = 1e-4


class SampleSize(NamedTuple):
  """The size of a video, in pixels and frames."""

  height: int
  width: int
  frames: int

  @classmethod
  def parse(cls, text: str) -> "SampleSize":
    """Reads HxWxF; raises UserError for another form."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
      raise UserError(
        f"--sample_size={text}: give HEIGHTxWIDTHxFRAMES in pixels and frames, such as 480x720x49."
      )
    return cls(*map(int, parts))

  def __str__(self) -> str:
    return "x".join(map(str, self))


def fit(model: Model, size: SampleSize | None = None) -> list[str]:
  """Changes a model so that diffusers computes the same at its sample size.

  Args:
    size: the sample size that the export is to have; by default the model's.

  Returns:
    What still differs in diffusers, a sentence each; empty if nothing does.

  Raises:
    UserError: the numbers would differ at the sample size; the message says the ways out.
  """
  notes = []
  settings: dict[str, Any] = (model.index or {}).get(SETTINGS, {})
  if transformer := model.networks.get("transformer"):
    vae = model.networks.get("vae")
    scale = vae.config.spatial_compression if vae else VAEConfig().spatial_compression
    notes += _fit_positions(model, transformer, scale, size)
    notes += _fit_image_scale(model, transformer, vae, settings)
    length = transformer.config.text_length
    if length != TEXT_LENGTH:
      notes.append(f"Prompts have {length} tokens: pass max_sequence_length={length}.")
  elif size:
    raise UserError(f"--sample_size={size}: there is no transformer, whose size it is.")
  if settings.get("text_drop") == "zeros":
    notes.append(
      "text_drop is zeros, but diffusers encodes the empty prompt for guidance: pass "
      "negative_prompt_embeds=torch.zeros_like(prompt_embeds), with prompt_embeds of "
      "pipe.encode_prompt."
    )
  notes += _fit_solver(model, settings)
  return notes


def _fit_positions(
  model: Model, transformer: Network, scale: int, size: SampleSize | None
) -> list[str]:
  """Gives the export the sample size at which diffusers' positions are the model's.

  scale: pixels of a latent.
  """
  config: DiTConfig = transformer.config
  own = SampleSize(config.sample_height * scale, config.sample_width * scale, config.sample_frames)
  wanted = size or own
  rule = component_fields.implied_positions(transformer.fields)
  exact = config.positions == rule
  if wanted != own:
    _check_size(wanted, config, scale)
    if config.learned_positions or (exact and rule == "rope" and wanted[:2] != own[:2]):
      raise UserError(
        f"--sample_size={wanted}: this model's positions depend on its sample size, {own}, and "
        "diffusers computes the same ones at every size: leave --sample_size out."
      )
  exported = config if exact else _with_base(config, rule, wanted, scale)
  exported = dataclasses.replace(exported, sample_frames=wanted.frames)
  if exact:
    exported = dataclasses.replace(
      exported, sample_height=wanted.height // scale, sample_width=wanted.width // scale
    )
  asked = size is not None or exported.base_grid == config.base_grid
  if not exact and not (asked and _same_positions(config, exported, rule, wanted, scale)):
    raise UserError(_refusal(config, exported, rule, wanted, scale))
  transformer.fields = {
    **transformer.fields,
    "sample_frames": exported.sample_frames,
    "sample_height": exported.sample_height,
    "sample_width": exported.sample_width,
  }
  transformer.config = dataclasses.replace(exported, positions=config.positions)
  if exact:
    return _largest_size(model, rule, wanted)
  return _position_notes(model, config, exported, rule, wanted, scale)


def _check_size(size: SampleSize, config: DiTConfig, scale: int) -> None:
  _, rows, columns = config.patch
  for name, value, step in (
    ("height", size.height, scale * rows),
    ("width", size.width, scale * columns),
    ("frames - 1", size.frames - 1, 4),
  ):
    if value % step:
      raise UserError(f"--sample_size={size}: {name} must be a multiple of {step}.")


def _with_base(config: DiTConfig, rule: str, size: SampleSize, scale: int) -> DiTConfig:
  """The config whose base grid makes diffusers' rule the model's at a size, where there is one.

  diffusers' `rope` stretches the base grid over the grid. So a base grid of the grid divided by an
  interpolation divides positions by it.
  """
  divided = rule == "rope" and config.positions == "rope_scaled"
  ratio = config.spatial_interpolation if divided else 1.0
  sides = []
  for pixels, patch in zip(size[:2], config.patch[1:], strict=True):
    sides.append(round(pixels // (scale * patch) / ratio) * patch)
  return dataclasses.replace(config, sample_height=sides[0], sample_width=sides[1])


def _same_positions(
  ours: DiTConfig, exported: DiTConfig, rule: str, size: SampleSize, scale: int
) -> bool:
  """Whether diffusers' rule gives an exported model the positions of ours, at a size."""
  grid = (2, *(p // (scale * patch) for p, patch in zip(size[:2], ours.patch[1:], strict=True)))
  coordinates = jnp.asarray(np.indices(grid).reshape(3, -1).T[None])
  grids = jnp.broadcast_to(jnp.asarray(grid), coordinates.shape)
  found = [
    rotary_positions(name, coordinates, grids, config.base_grid[1:], config.interpolations)
    for name, config in ((ours.positions, ours), (rule, exported))
  ]
  return bool(jnp.abs(found[0] - found[1]).max() < _TOLERANCE)


def _refusal(
  config: DiTConfig, exported: DiTConfig, rule: str, size: SampleSize, scale: int
) -> str:
  """Why a model's positions cannot be exported at a size, and what can be done."""
  ways = ["--format=orbax keeps the rule."]
  if _same_positions(config, exported, rule, size, scale):
    ways.insert(
      0,
      f"--sample_size={size} makes the export exact at that size. Its config.json then says "
      f"{exported.sample_height * scale}x{exported.sample_width * scale}, from which diffusers "
      "takes positions: pass height and width in every call.",
    )
  elif rule == "rope":
    ways.insert(0, "--sample_size=HxWxF with a size whose patches that divides evenly.")
  divided = f", which divides them by {config.interpolations}" * (config.positions != rule)
  scaled = divided if config.positions == "rope_scaled" else ""
  return (
    f"The model's rule of positions is {config.positions}{scaled}. diffusers would compute others "
    f"at {size}.\n  " + "\n  ".join(ways)
  )


def _largest_size(model: Model, rule: str, size: SampleSize) -> list[str]:
  """What diffusers refuses of a model with its own rule: with plain indices, larger sizes."""
  larger = [(h, w) for h, w in model.trained_sizes if h > size.height or w > size.width]
  if rule != "rope_index" or not larger:
    return []
  listed = ", ".join(f"{height}x{width}" for height, width in larger)
  note = (
    f"diffusers makes no video that is higher or wider than {size.height}x{size.width} pixels; "
    f"{listed} of the training are. Give a larger --sample_size for them."
  )
  return [note]


def _position_notes(
  model: Model, config: DiTConfig, exported: DiTConfig, rule: str, size: SampleSize, scale: int
) -> list[str]:
  """What differs in diffusers away from the sample size."""
  others = [
    f"{height}x{width}"
    for height, width in model.trained_sizes
    if not _same_positions(config, exported, rule, SampleSize(height, width, 1), scale)
  ]
  trained = f", such as {', '.join(others)} of the training" if others else ""
  notes = []
  notes.append(
    f"Positions ({config.positions}) are the model's at {size.height}x{size.width} pixels (height "
    f"x width), at any number of frames. At other sizes{trained}, diffusers computes others "
    f"({rule}): pass height={size.height}, width={size.width}, or choose another --sample_size."
  )
  default = exported.sample_height * scale, exported.sample_width * scale
  if default != size[:2]:
    notes.append(
      f"Without height and width, diffusers makes {default[0]}x{default[1]}, from which it takes "
      "positions: pass them in every call."
    )
  return notes


def _fit_image_scale(
  model: Model, transformer: Network, vae: Network | None, settings: dict[str, Any]
) -> list[str]:
  """Makes diffusers' scale of an image's latents that of the model."""
  choice = settings.get("image_scale", Settings.image_scale)
  if not transformer.config.takes_image or vae is None or choice == "diffusers":
    return []
  wanted = vae.config.image_scale(choice)
  vae.config = dataclasses.replace(vae.config, invert_scale_latents=False)
  vae.fields = {**vae.fields, "invert_scale_latents": False}
  model.index = {**(model.index or {}), SETTINGS: {**settings, "image_scale": "diffusers"}}
  factor = wanted / vae.config.image_scale("diffusers")
  if factor == 1:
    return []
  transformer.params = jax.tree.map_with_path(
    lambda path, leaf: (
      _Scaled(leaf, transformer.config, factor) if path_name(path) == "vision_in/kernel" else leaf
    ),
    transformer.params,
  )
  note = (
    f"image_scale is {choice}, but diffusers multiplies an image's latents by the scaling factor: "
    f"the image's weights in patch_embed.proj are multiplied by {factor:.6g} to undo it, so they "
    "differ from the trained ones."
  )
  return [note]


class _Scaled(Lazy):
  """The patch projection, with the weights of the image's latents times a factor."""

  layers = (...,)

  def __init__(self, base: Any, config: DiTConfig, factor: float):
    self.shape, self.dtype = base.shape, np.dtype(base.dtype)
    self._base, self._factor = base, factor
    self._noised = base.shape[0] * config.out_channels // config.in_channels  # Channels are first.

  def __getitem__(self, layer: Layer) -> np.ndarray:
    kernel = np.array(self._base[layer], np.float32)
    kernel[self._noised :] *= self._factor
    return kernel.astype(self.dtype)


def _fit_solver(model: Model, settings: dict[str, Any]) -> list[str]:
  """Names the model's solver by its scheduler class; returns how the model is sampled best."""
  if not settings:
    return []
  if name := component_fields.SCHEDULERS.get(settings.get("solver", "")):
    if model.scheduler is not None:
      model.scheduler = {**model.scheduler, "_class_name": name}
    model.index = {**(model.index or {}), "scheduler": ["diffusers", name]}
  best = [
    f"{argument}={settings[argument]:g}"
    for argument in ("guidance_scale", "num_inference_steps")
    if argument in settings and settings[argument] != getattr(Settings, argument)
  ]
  return [f"The model is sampled best with {', '.join(best)}."] if best else []
