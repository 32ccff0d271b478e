"""Compiles a program for TPUs that are not attached, and says whether it fits and what it costs.

python -m cogvideox_jax.compile --config=configs/5b.py --topology=v5p:4x4x4

A config of the VAE's training, such as configs/vae.py, has the programs train, encode and decode;
there the devices share the height of a clip that is encoded or decoded.

It reads the config only: no weights, no data, no device. It compiles the function that the command
of the program's name runs. Exit code 0: the program fits. Exit code 1: it does not; the same is
printed, with three suggestions. --json adds one object as the last line.
"""

import json

from absl import flags

from cogvideox_jax import command
from cogvideox_jax.aot import programs
from cogvideox_jax.aot.report import as_table, report
from cogvideox_jax.config.checks import check, check_values
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.config.vae_schema import VAETrainConfig

CONFIG = command.config_flag(TrainConfig, VAETrainConfig)
TOPOLOGY = flags.DEFINE_string(
  "topology", None, "KIND:SHAPE[:SLICES], such as v5p:4x4x4 or v5p:2x2x4:2.", required=True
)
PROGRAM = flags.DEFINE_enum("program", "train", programs.PROGRAMS, "What to compile.")
STAGE = flags.DEFINE_string("stage", "1", "Stage of the config, by its number from 1 or its name.")
SIZE = {
  name: flags.DEFINE_integer(name, None, f"{text}; by default the model's.", lower_bound=1)
  for name, text in (
    ("num_frames", "Pixel frames of the clip to sample, encode or decode"),
    ("height", "Pixels"),
    ("width", "Pixels"),
  )
}
JSON = flags.DEFINE_bool("json", False, "Print one JSON object as the last line.")


def main() -> int:
  config = CONFIG.value
  if isinstance(config, TrainConfig):
    check(config, config.components)
  else:
    check_values(config)
  size = {name: flag.value for name, flag in SIZE.items() if flag.value is not None}
  result = report(config, TOPOLOGY.value, PROGRAM.value, STAGE.value, **size)
  print(as_table(result))
  if JSON.value:
    print(json.dumps(result))
  return 0 if result["fits"] else 1


if __name__ == "__main__":
  command.run(main)
