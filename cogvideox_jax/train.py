"""Trains the transformer: `python -m cogvideox_jax.train --config=configs/tiny.py --workdir=DIR`.

The same command goes on where an earlier one, of any fate, had last saved.
"""

from absl import flags
from etils import epath

from cogvideox_jax import command, config
from cogvideox_jax.sharding import split_cpu
from cogvideox_jax.training.loop import train

CONFIG = command.config_flag()
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of checkpoints, previews and metrics; may be a bucket.", required=True
)


def main() -> int:
  config.check(CONFIG.value, CONFIG.value.components)
  split_cpu(CONFIG.value.cpu_devices)
  return train(CONFIG.value, epath.Path(WORKDIR.value))


if __name__ == "__main__":
  command.run(main)
