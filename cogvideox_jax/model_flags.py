"""Flags of every command that takes a model: which weights to use, and a LoRA to add.

A command that uses them calls `declare`, so that its --help lists them.
"""

from absl import flags

WEIGHTS = flags.DEFINE_enum(
  "weights",
  "ema",
  ["ema", "raw"],
  "Which weights of a training workdir to use: their moving average, or the last ones.",
)
LORA = flags.DEFINE_string("lora", None, "LoRA file to add, or a folder that holds one.")
LORA_WEIGHT = flags.DEFINE_float(
  "lora_weight", 1.0, "Weight of --lora; for a file without alpha give alpha / rank."
)


def declare() -> None:
  """Lists these flags in the --help of the command that calls this."""
  for name in ("weights", "lora", "lora_weight"):
    flags.declare_key_flag(name)


flags.disclaim_key_flags()
