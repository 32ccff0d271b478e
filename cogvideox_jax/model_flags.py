"""Flags of every command that takes a model: which weights to use, and a LoRA to add.

A command that uses them calls `declare`, so that its --help lists them.
"""

from absl import flags

from cogvideox_jax import path_flags
from cogvideox_jax.conversion import lora
from cogvideox_jax.conversion.lora import LoRA

WEIGHTS = flags.DEFINE_enum(
  "weights",
  "ema",
  ["ema", "raw"],
  "Which weights of a training workdir to use: their moving average, or the last ones.",
)
LORA = path_flags.define(
  "lora", None, "LoRA file to add, or a folder that holds one.", may_be_empty=True
)
LORA_WEIGHT = flags.DEFINE_float("lora_weight", 1.0, "Weight of --lora; it multiplies its scale.")
LORA_ALPHA = flags.DEFINE_float(
  "lora_alpha",
  None,
  "Alpha of --lora, for a file that does not say it, as SAT's: its scale is then alpha / rank. "
  "Files of diffusers without alpha have scale 1.",
)


def declare() -> None:
  """Lists these flags in the --help of the command that calls this."""
  for name in ("weights", "lora", "lora_weight", "lora_alpha"):
    flags.declare_key_flag(name)


def read_lora() -> LoRA | None:
  """The updates of --lora; None if it is not given.

  Raises:
    UserError: as `lora.read`; or nothing says the scale of a file of SAT.
  """
  if not LORA.value:
    return None
  weight_given = flags.FLAGS["lora_weight"].present
  return lora.read(LORA.value, LORA_ALPHA.value, must_know_alpha=not weight_given)


flags.disclaim_key_flags()
