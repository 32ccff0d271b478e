"""Writes a trained VAE in diffusers' layout, with a scaling factor measured on its latents."""

import dataclasses
from collections.abc import Iterable
from functools import partial

import jax
import numpy as np
from etils import epath

from cogvideox_jax import hosts
from cogvideox_jax.conversion import diffusers
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.models.vae_config import VAEConfig
from cogvideox_jax.training.vae_step import latent_sums
from cogvideox_jax.types import Params

DECIMALS = 6  # The scaling factor is rounded to so many.


def export(
  folder: epath.Path, config: VAEConfig, params: Params, frames: Iterable[jax.Array]
) -> float:
  """Writes a VAE into a folder. Every process of a job calls it; the first one writes.

  Args:
    params: parameters on a mesh.
    frames: batches of clips on the mesh, bytes [b, F, H, W, 3].

  Returns:
    The scaling factor that it wrote.
  """
  factor = round(measure_scaling_factor(config, params, frames), DECIMALS)
  arrays = jax.tree.map(hosts.whole, params)
  if hosts.is_first():
    diffusers.save_vae(folder, dataclasses.replace(config, scaling_factor=factor), arrays)
  return factor


def measure_scaling_factor(config: VAEConfig, params: Params, frames: Iterable[jax.Array]) -> float:
  """Returns 1 over the standard deviation of clips' latents, sampled from the posterior.

  Args:
    frames: batches of clips, bytes [b, F, H, W, 3].
  """
  sums_of = jax.jit(partial(latent_sums, graphdef=graph_of(VAE, config)))
  count, sums = 0, np.zeros(2)
  for batch in frames:
    found = sums_of(params, batch)
    count += int(found.size)
    sums += np.array([found.total, found.squares], np.float64)
  total, squares = sums / count
  return float((squares - total**2) ** -0.5)
