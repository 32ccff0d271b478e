"""Configs of tests, made as users make them and read as the commands read them."""

from cogvideox_jax.config.read import read
from cogvideox_jax.config.schema import TrainConfig


def typed(config, schema=TrainConfig, **changes):
  """What the package is given of a ConfigDict; `__` stands for a dot in the keys of `changes`."""
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in changes.items()}
  )
  return read(schema, config)
