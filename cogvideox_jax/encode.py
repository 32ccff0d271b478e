"""Encodes clips and captions with the VAE and the text encoder, once, before training.

python -m cogvideox_jax.encode --config=configs/tiny.py --input=FOLDER --output=DIR --model=tiny

On several hosts, run it once on each; all must see the same files. On TPU pods, and on clusters
that JAX knows, this is all. Elsewhere add --coordinator=HOST:PORT --process_count=N, and
--process_id from 0 to N-1.
"""

from absl import flags
from etils import epath

from cogvideox_jax import command, job, path_flags
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.conversion.folder import SHIPPED
from cogvideox_jax.exclusive import exclusive
from cogvideox_jax.precompute import encode_clips

CONFIG = command.config_flag(TrainConfig)
INPUT = path_flags.define(
  "input", None, "Folder of clips, or a manifest: JSON lines, CSV, Parquet.", required=True
)
OUTPUT = path_flags.define("output", None, "Where the datasets go.", required=True)
MODEL = path_flags.define(
  "model",
  None,
  "Model folder or shipped name: VAE, text encoder, tokenizer.",
  required=True,
  names=SHIPPED,
)
SUBFOLDERS = flags.DEFINE_bool(
  "subfolders", True, "Search the folders inside a folder of clips that has no manifest."
)
ALLOW_LINKS = flags.DEFINE_bool(
  "allow_links", False, "Follow links that lead out of the folder, as those of caches do."
)
WORKERS = flags.DEFINE_integer(
  "workers", encode_clips.WORKERS, "Processes that decode files.", lower_bound=1
)
job.declare_flags()


def main() -> None:
  config = CONFIG.value  # Its mistakes come before any folder is made.
  with job.joined(), exclusive(epath.Path(OUTPUT.value)):
    try:
      counts = encode_clips.encode(
        config,
        INPUT.value,
        OUTPUT.value,
        MODEL.value,
        workers=WORKERS.value,
        subfolders=SUBFOLDERS.value,
        allow_links=ALLOW_LINKS.value,
      )
    except KeyboardInterrupt:
      print(f"Whole shards are kept in {OUTPUT.value}: the same command goes on from there.")
      raise
  print(f"{counts.clips} clips encoded into {OUTPUT.value}; {counts.refused} refused")
  if counts.refused:
    print(f"Why: {OUTPUT.value}/quarantine.jsonl")


if __name__ == "__main__":
  command.run(main)
