"""The config of a workdir or a dataset: `--config=WORKDIR/config.json` loads it through this file.

It is read as JSON, and never executed.
"""

import json

from ml_collections import ConfigDict

from cogvideox_jax.config.read import read, to_dict
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.version import name_writer

# Keys of config.json that are none of the config: the digests of the datasets, and the version of
# the package that wrote the file.
DIGESTS_KEY, VERSION_KEY = "data_digests", "version"


def get_config(path: str) -> ConfigDict:
  """Returns the config in a file that a training or `encode` wrote.

  Raises:
    UserError: the file is no such config, or one of another version.
  """
  try:
    with open(path, encoding="utf-8") as file:
      fields = json.load(file)
  except ValueError as error:
    raise UserError(f"{path} is not JSON ({error}).") from error
  if not isinstance(fields, dict):
    raise UserError(f"{path} must hold one JSON object.")
  fields.pop(DIGESTS_KEY, None)
  version = fields.pop(VERSION_KEY, None)
  try:
    config = read(VAETrainConfig if "loss" in fields else TrainConfig, fields)
  except UserError as error:
    raise UserError("\n".join(filter(None, [f"{path}: {error}", name_writer(version)]))) from error
  return ConfigDict(to_dict(config)).lock()
