"""Random tensors that depend on a seed and on their name alone."""

import contextlib
import importlib
import zlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

DRAWING = {  # Who draws in diffusers -> its module.
  "pipeline_cogvideox": "diffusers.pipelines.cogvideo.pipeline_cogvideox",
  "pipeline_cogvideox_image2video": "diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video",
  "pipeline_cogvideox_video2video": "diffusers.pipelines.cogvideo.pipeline_cogvideox_video2video",
  "scheduling_dpm_cogvideox": "diffusers.schedulers.scheduling_dpm_cogvideox",
  "vae": "diffusers.models.autoencoders.vae",
}


class Draws:
  """Draws by name. The order of the calls, such as that of a model's layers, changes nothing."""

  def __init__(self, seed: int):
    self._seed = seed

  def generator(self, name: str) -> torch.Generator:
    """A generator of its own for each name."""
    seed = zlib.crc32(name.encode()) * 1_000_003 + self._seed * 7_919 + 17
    return torch.Generator("cpu").manual_seed(seed % (2**63 - 1))

  def normal(self, name: str, *shape: int, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=self.generator(name)) * std

  def uniform(self, name: str, *shape: int) -> Tensor:
    """In [0, 1)."""
    return torch.rand(*shape, generator=self.generator(name))

  def integers(self, name: str, start: int, stop: int, *shape: int) -> Tensor:
    """In [start, stop)."""
    return torch.randint(start, stop, shape, generator=self.generator(name))


@contextlib.contextmanager
def recorded_draws() -> Iterator[list[tuple[str, Tensor]]]:
  """Lists the normal draws that diffusers makes meanwhile, in order: who draws, and the draw."""
  found: list[tuple[str, Tensor]] = []

  def recording(source: str, draw):
    def record(*args, **kwargs) -> Tensor:
      drawn = draw(*args, **kwargs)
      found.append((source, drawn.clone()))
      return drawn

    return record

  with contextlib.ExitStack() as stack:
    for source, name in DRAWING.items():
      module = importlib.import_module(name)
      draw = recording(source, module.randn_tensor)
      stack.enter_context(mock.patch.object(module, "randn_tensor", draw))
    yield found
