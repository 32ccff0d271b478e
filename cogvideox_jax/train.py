"""Trains the transformer: `python -m cogvideox_jax.train --config=configs/tiny.py --workdir=DIR`.

The same command goes on where an earlier one, of any fate, had last saved.

--dry_run=TOPOLOGY trains nothing and writes nothing: it compiles the first stage's step for TPUs
that are not there, as `compile` does. Exit code 0: it fits. 1: it does not.

On several hosts, run it once on each; all must see the same files. TPU pods and clusters that JAX
knows need no more. Elsewhere say --coordinator=HOST:PORT --process_count=N --process_id=0 to N-1.
"""

from absl import flags
from etils import epath

from cogvideox_jax import command, dry_run, hosts, job, path_flags
from cogvideox_jax.config.checks import check
from cogvideox_jax.config.read import to_json
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.sharding import split_cpu

CONFIG = command.config_flag(TrainConfig)
WORKDIR = path_flags.define(
  "workdir", None, "Folder of checkpoints, previews and metrics; may be a bucket."
)
DRY_RUN = flags.DEFINE_string(
  "dry_run", None, "Compile for a topology, such as v5p:4x4x4, and say whether it fits."
)
job.declare_flags()


def main() -> int:
  check(CONFIG.value, CONFIG.value.components)
  if DRY_RUN.value is not None:
    return dry_run.run(CONFIG.value, DRY_RUN.value)
  if WORKDIR.value is None:
    raise UserError("Missing flag: --workdir=...\nSee --help for the flags.")
  from cogvideox_jax.training.transformer_run import train  # It takes seconds, as in train_vae.

  split_cpu(CONFIG.value.cpu_devices)
  with job.joined(WORKDIR.value):
    hosts.check_same("config", to_json(CONFIG.value))
    return train(CONFIG.value, epath.Path(WORKDIR.value))


if __name__ == "__main__":
  command.run(main)
