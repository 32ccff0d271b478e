"""Loads the weights that a training begins with: a model's, or another training's."""

from functools import partial

import jax
import numpy as np
from etils import epath

from cogvideox_jax.conversion import orbax, tensors
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import checkpoint
from cogvideox_jax.types import Params


def load_initial(source: str, wanted: Params) -> Params:
  """Returns the transformer of a model folder, or a workdir's moving average, as fp32 host arrays.

  Args:
    source: `config.init_from`.
    wanted: arrays, or their shapes, of the transformer to be trained.

  Raises:
    UserError: there are no such weights, or their paths or shapes are not those of `wanted`.
  """
  if (epath.Path(source) / "checkpoints").is_dir():
    weights = checkpoint.open_weights(source)
    params = tensors.materialize(weights.params)
    stored = epath.Path(source) / "checkpoints" / str(weights.step)
  else:
    model = open_model(source)
    params = model.transformer()[1]
    stored = model.path / "transformer" / orbax.FOLDER
  with orbax.naming_writer(stored):
    _check_shapes(source, params, wanted)
  return jax.tree.map(partial(np.asarray, dtype=np.float32), params)


def _check_shapes(source: str, params: Params, wanted: Params) -> None:
  found, shapes_wanted = map(tensors.flatten, (params, wanted))
  for name in sorted(found.keys() | shapes_wanted.keys()):
    has = found[name].shape if name in found else None
    wants = shapes_wanted[name].shape if name in shapes_wanted else None
    if has != wants:
      raise UserError(
        f"config.init_from={source} has another transformer than config.model: {name} is "
        f"{has or 'absent'} there and {wants or 'absent'} here.\nMake config.model the same as its."
      )
