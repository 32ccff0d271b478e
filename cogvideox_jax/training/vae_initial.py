"""Loads the VAE that a training begins with."""

from functools import partial

import jax
import numpy as np
from etils import epath

from cogvideox_jax import paths
from cogvideox_jax.conversion import diffusers, tensors
from cogvideox_jax.conversion.folder import SHIPPED, open_model, open_network
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.vae_config import VAEConfig
from cogvideox_jax.training import checkpoint
from cogvideox_jax.types import Params


def load_vae(source: str, config: VAEConfig, wanted: Params) -> Params:
  """Returns the VAE of a model, a VAE's folder, or a workdir of train_vae, as fp32 host arrays.

  Args:
    source: `config.init_from`. Of a workdir, finished or not, it is the moving average.
    config: the VAE to be trained.
    wanted: the shapes of its parameters.

  Raises:
    UserError: there is no VAE, or it is not of `config`.
  """
  found = _open(source)
  shapes, shapes_wanted = (
    {name: x.shape for name, x in tensors.flatten(tree).items()} for tree in (found, wanted)
  )
  for name in sorted(shapes.keys() | shapes_wanted.keys()):
    if shapes.get(name) != shapes_wanted.get(name):
      raise UserError(
        f"config.init_from={source} has another VAE than config.model: {name} is "
        f"{shapes.get(name, 'absent')} there and {shapes_wanted.get(name, 'absent')} here.\n"
        "Make config.model the same as its."
      )
  return jax.tree.map(partial(np.asarray, dtype=np.float32), tensors.materialize(found))


def _open(source: str) -> Params:
  folder = epath.Path(source)
  if source in SHIPPED:
    return open_model(source).open("vae")[1]
  if (folder / "checkpoints").is_dir():
    return checkpoint.open_weights(source).params
  if (folder / diffusers.CONFIG).is_file():
    return open_network("vae", epath.Path(paths.absolute(source)))[1]
  return open_model(source).open("vae")[1]
