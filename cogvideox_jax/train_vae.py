"""Trains the causal 3D VAE, and writes it in diffusers' layout.

python -m cogvideox_jax.train_vae --config=configs/vae_tiny.py --workdir=runs/vae_tiny

The same command goes on where an earlier one, of any fate, had last saved.

On several hosts, run it once on each; all must see the same files. TPU pods and clusters that JAX
knows need no more. Elsewhere say --coordinator=HOST:PORT --process_count=N --process_id=0 to N-1.
"""

from etils import epath

from cogvideox_jax import command, hosts, job, path_flags
from cogvideox_jax.config.read import to_json
from cogvideox_jax.config.schema import VAETrainConfig
from cogvideox_jax.sharding import split_cpu

CONFIG = command.config_flag(VAETrainConfig)
WORKDIR = path_flags.define(
  "workdir", None, "Folder of checkpoints, previews, metrics and the VAE.", required=True
)
job.declare_flags()


def main() -> int:
  from cogvideox_jax.training import vae_run

  split_cpu(CONFIG.value.cpu_devices)
  with job.joined():
    hosts.check_same("config", to_json(CONFIG.value))
    return vae_run.train(CONFIG.value, epath.Path(WORKDIR.value))


if __name__ == "__main__":
  command.run(main)
