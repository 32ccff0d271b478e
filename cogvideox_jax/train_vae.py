"""Trains the causal 3D VAE.

python -m cogvideox_jax.train_vae --config=configs/vae_tiny.py --workdir=runs/vae_tiny
"""

from absl import flags
from etils import epath

from cogvideox_jax import command
from cogvideox_jax.config.schema import VAETrainConfig

CONFIG = command.config_flag(VAETrainConfig)
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the run lives; resumes by itself.", required=True
)


def main() -> int:
  from cogvideox_jax.training import vae_run

  return vae_run.train(CONFIG.value, epath.Path(WORKDIR.value))


if __name__ == "__main__":
  command.run(main)
