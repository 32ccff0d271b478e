"""Converts our frozen configs to the `config.json` of diffusers and transformers, and back.

Our models support one value only of some fields. Such a field is written with that value, and a
file with another value is refused by an error that names the field. Fields that do not change the
computed numbers (versions, tile sizes, training-only settings) are not checked.
"""

import math
from collections.abc import Mapping
from typing import Any

from cogvideox_jax.diffusion.noise import PREDICTIONS, SPACINGS, NoiseConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.positions import RULES
from cogvideox_jax.models.t5 import T5Config
from cogvideox_jax.models.vae_config import VAEConfig

Fields = Mapping[str, Any]

SCHEDULERS = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}  # By solver.
VERSION = "0.42.1"  # The diffusers release whose folder layout is written.

# Our field -> their field with the same value.
TRANSFORMER_NAMES = {
  "depth": "num_layers",
  "heads": "num_attention_heads",
  "head_dim": "attention_head_dim",
  "time_width": "time_embed_dim",
  "in_channels": "in_channels",
  "out_channels": "out_channels",
  "text_width": "text_embed_dim",
  "text_length": "max_text_seq_length",
  "sample_frames": "sample_frames",
  "sample_height": "sample_height",
  "sample_width": "sample_width",
  "spatial_interpolation": "spatial_interpolation_scale",
  "temporal_interpolation": "temporal_interpolation_scale",
  "learned_positions": "use_learned_positional_embeddings",
}
TRANSFORMER_FIXED = {
  "activation_fn": "gelu-approximate",
  "attention_bias": True,
  "dropout": 0.0,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "norm_elementwise_affine": True,
  "norm_eps": 1e-5,
  "temporal_compression_ratio": 4,
  "timestep_activation_fn": "silu",
}
# Our own field. It names the position rule where diffusers' fields do not determine it; diffusers
# ignores it.
POSITION_RULE = "position_rule"

VAE_NAMES = {
  "in_channels": "in_channels",
  "latent_channels": "latent_channels",
  "resnets": "layers_per_block",
  "groups": "norm_num_groups",
  "temporal_compression": "temporal_compression_ratio",
  "scaling_factor": "scaling_factor",
  "sample_height": "sample_height",
  "sample_width": "sample_width",
  "invert_scale_latents": "invert_scale_latents",
}
VAE_FIXED = {
  "act_fn": "silu",
  "latents_mean": None,
  "latents_std": None,
  "norm_eps": 1e-6,
  "shift_factor": None,
  "use_post_quant_conv": False,
  "use_quant_conv": False,
}

TEXT_NAMES = {
  "vocab": "vocab_size",
  "width": "d_model",
  "head_dim": "d_kv",
  "heads": "num_heads",
  "mlp_width": "d_ff",
  "depth": "num_layers",
  "buckets": "relative_attention_num_buckets",
  "max_distance": "relative_attention_max_distance",
}
TEXT_FIXED = {"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6, "model_type": "t5"}

NOISE_NAMES = {
  "steps": "num_train_timesteps",
  "beta_start": "beta_start",
  "beta_end": "beta_end",
  "snr_shift": "snr_shift_scale",
  "zero_terminal_snr": "rescale_betas_zero_snr",
  "prediction": "prediction_type",
  "spacing": "timestep_spacing",
  "steps_offset": "steps_offset",
  "ends_clean": "set_alpha_to_one",
}
NOISE_DEFAULTS = {  # The defaults of both scheduler classes, for fields that a file leaves out.
  "num_train_timesteps": 1000,
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "snr_shift_scale": 3.0,
  "rescale_betas_zero_snr": False,
  "prediction_type": "epsilon",
  "timestep_spacing": "leading",
  "steps_offset": 0,
  "set_alpha_to_one": True,
}
NOISE_FIXED = {"beta_schedule": "scaled_linear", "trained_betas": None}
NOISE_UNREAD = {"clip_sample": False}  # Neither scheduler class clips, whatever this says.


def read_transformer(fields: Fields, where: str) -> DiTConfig:
  """Reads the fields of a `CogVideoXTransformer3DModel`.

  where: names the file in errors.

  Raises:
    UserError: a field is missing, or has a value that our model does not support.
  """
  _check_fixed(fields, TRANSFORMER_FIXED, where)
  patch_frames, patch = fields.get("patch_size_t"), fields.get("patch_size", 2)
  for name, value in (("patch_size_t", patch_frames or 1), ("patch_size", patch)):
    _typed(value, int, f"{where}: {name}")
  if patch_frames is None:
    _check_fixed(fields, {"patch_bias": True}, where)  # With patch_size_t there always is a bias.
  positions = fields.get(POSITION_RULE, implied_positions(fields))
  if positions not in RULES:
    raise UserError(f"{where}: {POSITION_RULE} is {positions!r}, not one of {RULES}.")
  fields = {"use_learned_positional_embeddings": False, **fields}  # CogVideoX 1.0 leaves it out.
  return DiTConfig(
    **_ours(fields, TRANSFORMER_NAMES, where, DiTConfig),
    ofs_width=fields.get("ofs_embed_dim") or 0,
    patch=(patch_frames or 1, patch, patch),
    positions=positions,
  )


def write_transformer(config: DiTConfig) -> dict[str, Any]:
  """The fields that diffusers reads the same transformer from.

  Raises:
    UserError: diffusers has no field for the config's patch.
  """
  frames, height, width = config.patch
  if height != width:
    raise UserError(f"diffusers has no field for a patch that is not square: {config.patch}.")
  fields = {
    "_class_name": "CogVideoXTransformer3DModel",
    "_diffusers_version": VERSION,
    **_theirs(config, TRANSFORMER_NAMES),
    **TRANSFORMER_FIXED,
    "ofs_embed_dim": config.ofs_width or None,
    "patch_bias": frames == 1,
    "patch_size": height,
    "patch_size_t": frames if frames > 1 else None,
    "use_rotary_positional_embeddings": config.positions != "sincos",
  }
  if config.positions != implied_positions(fields):
    fields[POSITION_RULE] = config.positions
  return fields


def implied_positions(fields: Fields) -> str:
  """The position rule that diffusers applies to a model with these fields."""
  if not fields.get("use_rotary_positional_embeddings", False):
    return "sincos"
  return "rope" if fields.get("patch_size_t") is None else "rope_index"


def read_vae(fields: Fields, where: str) -> VAEConfig:
  """Reads the fields of an `AutoencoderKLCogVideoX`; see `read_transformer`."""
  _check_fixed(fields, VAE_FIXED, where)
  channels = fields.get("block_out_channels", VAEConfig().channels)
  sizes = {"sample_height": 480, "sample_width": 720}  # diffusers' defaults.
  fields = {"invert_scale_latents": False, **sizes, **fields}
  return VAEConfig(**_ours(fields, VAE_NAMES, where, VAEConfig), channels=tuple(channels))


def write_vae(config: VAEConfig) -> dict[str, Any]:
  """The fields that diffusers reads the same VAE from."""
  levels = len(config.channels)
  return {
    "_class_name": "AutoencoderKLCogVideoX",
    "_diffusers_version": VERSION,
    **_theirs(config, VAE_NAMES),
    **VAE_FIXED,
    "block_out_channels": list(config.channels),
    "down_block_types": ["CogVideoXDownBlock3D"] * levels,
    "out_channels": config.in_channels,
    "up_block_types": ["CogVideoXUpBlock3D"] * levels,
  }


def read_text_encoder(fields: Fields, where: str) -> T5Config:
  """Reads the fields of a `T5EncoderModel`; see `read_transformer`."""
  _check_fixed(fields, TEXT_FIXED, where)
  # Files from before 2022 leave this field out and mean 128.
  fields = {"relative_attention_max_distance": 128, **fields}
  return T5Config(**_ours(fields, TEXT_NAMES, where, T5Config))


def write_text_encoder(config: T5Config) -> dict[str, Any]:
  """The fields that transformers reads the same encoder from."""
  return {
    "architectures": ["T5EncoderModel"],
    **_theirs(config, TEXT_NAMES),
    **TEXT_FIXED,
    "dense_act_fn": "gelu_new",
    "eos_token_id": 1,
    "is_encoder_decoder": False,
    "is_gated_act": True,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "use_cache": False,
  }


def read_noise(fields: Fields, where: str) -> NoiseConfig:
  """Reads the fields of a `CogVideoXDDIMScheduler` or `CogVideoXDPMScheduler`.

  A field that the file leaves out has the default of both classes, such as snr_shift_scale 3.
  `where` and errors are as in `read_transformer`.
  """
  _check_fixed(fields, NOISE_FIXED, where)
  kind = fields.get("_class_name")
  if kind is not None and kind not in SCHEDULERS.values():
    known = " or ".join(SCHEDULERS.values())
    raise UserError(
      f"{where}: the scheduler is {kind}, which samples other models; CogVideoX has {known}.\n"
      "Give the scheduler folder of the model's release."
    )
  config = NoiseConfig(**_ours({**NOISE_DEFAULTS, **fields}, NOISE_NAMES, where, NoiseConfig))
  if not 0 < config.beta_start <= config.beta_end < 1 or config.snr_shift <= 0 or config.steps < 1:
    raise UserError(
      f"{where}: beta_start {config.beta_start:g}, beta_end {config.beta_end:g}, snr_shift_scale "
      f"{config.snr_shift:g} and num_train_timesteps {config.steps} are no noise schedule:\n"
      "0 < beta_start <= beta_end < 1, and the others are above 0."
    )
  for name, value, choices in (
    ("prediction_type", config.prediction, PREDICTIONS),
    ("timestep_spacing", config.spacing, SPACINGS),
  ):
    if value not in choices:
      raise UserError(f"{where}: {name} is {value!r}, not one of {', '.join(choices)}.")
  return config


def write_noise(config: NoiseConfig, solver: str = "ddim") -> dict[str, Any]:
  """The fields that diffusers reads the same noise schedule, and the solver, from.

  solver: one of SCHEDULERS.
  """
  return {
    "_class_name": SCHEDULERS[solver],
    "_diffusers_version": VERSION,
    **_theirs(config, NOISE_NAMES),
    **NOISE_FIXED,
    **NOISE_UNREAD,
  }


def _ours(fields: Fields, names: Mapping[str, str], where: str, config: type) -> dict[str, Any]:
  """The values of `names`' fields under our names.

  config: the dataclass that takes them, whose types they must have.
  """
  missing = [theirs for theirs in names.values() if theirs not in fields]
  if missing:
    raise UserError(f"{where} lacks {', '.join(missing)}: it is damaged, or of another model.")
  return {
    ours: _typed(fields[theirs], config.__dataclass_fields__[ours].type, f"{where}: {theirs}")
    for ours, theirs in names.items()
  }


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}


def _typed(value: Any, wanted: Any, what: str) -> Any:
  """A field's value, if it has the type of our config's field; null stands for false.

  Raises:
    UserError: it has another type, or is a number that is not finite, or a negative size.
  """
  if wanted is bool and value is None:
    return False
  accepted = int | float if wanted is float else wanted
  fits = isinstance(value, accepted) and (wanted is bool or not isinstance(value, bool))
  if not fits or (wanted is float and not math.isfinite(value)) or (wanted is int and value < 0):
    raise UserError(f"{what} is {value!r}; it must be {_KINDS[wanted]}. Fetch the file again.")
  return float(value) if wanted is float else value


def _theirs(config, names: Mapping[str, str]) -> dict[str, Any]:
  """The values of a config under their names."""
  return {theirs: getattr(config, ours) for ours, theirs in names.items()}


def _check_fixed(fields: Fields, fixed: Fields, where: str):
  """Refuses a field with another value than the supported one. An absent field passes."""
  for name, value in fixed.items():
    if name in fields and fields[name] != value:
      raise UserError(
        f"{where}: {name} is {fields[name]!r}; this kind of model is not supported yet "
        f"(only {name} = {value!r})."
      )
