"""Runs the VAE and the text encoder over clips, once, for training to read.

python -m cogvideox_jax.encode --config=configs/tiny.py --input=FOLDER --output=DIR --model=tiny

On several hosts, run it once on each; all must see the same files. TPU pods and clusters that JAX
knows need no more. Elsewhere say --coordinator=HOST:PORT --process_count=N --process_id=0 to N-1.
"""

from absl import flags
from etils import epath

from cogvideox_jax import command, encoding, hosts
from cogvideox_jax.data.files import write_atomically

CONFIG = command.config_flag()
INPUT = flags.DEFINE_string("input", None, "Manifest (JSON lines) or folder.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Where the datasets go.", required=True)
MODEL = flags.DEFINE_string(
  "model", None, "Model folder or shipped name: VAE, text encoder, tokenizer.", required=True
)
WORKERS = flags.DEFINE_integer(
  "workers", encoding.WORKERS, "Processes that decode files.", lower_bound=1
)
COORDINATOR = flags.DEFINE_string(
  "coordinator", "", "HOST:PORT of process 0, where the processes of a job meet."
)
PROCESS_COUNT = flags.DEFINE_integer("process_count", 1, "Of the job.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", 0, "This one's, from 0.", lower_bound=0)


def main() -> None:
  hosts.join(hosts.Group(COORDINATOR.value, PROCESS_COUNT.value, PROCESS_ID.value))
  try:
    counts = encoding.encode(
      CONFIG.value, INPUT.value, OUTPUT.value, MODEL.value, workers=WORKERS.value
    )
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
