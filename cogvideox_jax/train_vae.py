"""Trains the causal 3D VAE, and writes it in diffusers' layout.

python -m cogvideox_jax.train_vae --config=configs/vae_tiny.py --workdir=runs/vae_tiny

The same command goes on where an earlier one, of any fate, had last saved.

--dry_run=TOPOLOGY trains nothing and writes nothing: it compiles the first stage's step for TPUs
that are not there, as `compile` does. Exit code 0: it fits. 1: it does not.

On several hosts, run it once on each; all must see the same files. TPU pods and clusters that JAX
knows need no more. Elsewhere say --coordinator=HOST:PORT --process_count=N --process_id=0 to N-1.
"""

from absl import flags
from etils import epath

from cogvideox_jax import command, dry_run, hosts, job, path_flags
from cogvideox_jax.config.read import to_json
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.sharding import split_cpu

CONFIG = command.config_flag(VAETrainConfig)
WORKDIR = path_flags.define(
  "workdir", None, "Folder of checkpoints, previews, metrics and the VAE."
)
DRY_RUN = flags.DEFINE_string(
  "dry_run", None, "Compile for a topology, such as v5p:4x4x4, and say whether it fits."
)
job.declare_flags()


def main() -> int:
  from cogvideox_jax.training import vae_run

  if DRY_RUN.value is not None:
    return dry_run.run(CONFIG.value, DRY_RUN.value)
  if WORKDIR.value is None:
    raise UserError("Missing flag: --workdir=...\nSee --help for the flags.")
  split_cpu(CONFIG.value.cpu_devices)
  with job.joined(WORKDIR.value):
    hosts.check_same("config", to_json(CONFIG.value))
    return vae_run.train(CONFIG.value, epath.Path(WORKDIR.value))


if __name__ == "__main__":
  command.run(main)
