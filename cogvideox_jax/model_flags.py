"""Flags of every command that takes a model: which of its weights, and a LoRA to add.

A command that imports them declares them as its own (`flags.declare_key_flag`), for its --help.
"""

from absl import flags

WEIGHTS = flags.DEFINE_enum(
  "weights", "ema", ["ema", "raw"], "Of a training workdir: the moving average, or as trained."
)
LORA = flags.DEFINE_string("lora", None, "LoRA file, or a folder that has one, to add.")
LORA_WEIGHT = flags.DEFINE_float("lora_weight", 1.0, "Of --lora: alpha / rank if it has no alpha.")


def declare() -> None:
  """Lists them in the --help of the command that calls this."""
  for name in ("weights", "lora", "lora_weight"):
    flags.declare_key_flag(name)


flags.disclaim_key_flags()
