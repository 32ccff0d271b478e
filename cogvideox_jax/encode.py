"""Runs the VAE and the text encoder over clips, once, for training to read.

python -m cogvideox_jax.encode --config=configs/tiny.py --input=FOLDER --output=DIR --model=tiny
"""

from absl import flags
from etils import epath

from cogvideox_jax import command
from cogvideox_jax.data.files import write_atomically

CONFIG = command.config_flag()
INPUT = flags.DEFINE_string("input", None, "Manifest (JSON lines) or folder.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Where the datasets go.", required=True)
MODEL = flags.DEFINE_string(
  "model", None, "Model folder or shipped name: VAE, text encoder, tokenizer.", required=True
)


def main() -> None:
  from cogvideox_jax import encoding

  try:
    counts = encoding.encode(CONFIG.value, INPUT.value, OUTPUT.value, MODEL.value)
  except KeyboardInterrupt:
    print(f"Whole shards are kept in {OUTPUT.value}: the same command goes on from there.")
    raise
  # For `inspect`, which then needs not be told what the dataset is for.
  write_atomically(epath.Path(OUTPUT.value) / "config.json", CONFIG.value.to_json().encode())
  print(f"{counts.clips} clips encoded into {OUTPUT.value}; {counts.refused} refused")
  if counts.refused:
    print(f"Why: {OUTPUT.value}/quarantine.jsonl")


if __name__ == "__main__":
  command.run(main)
