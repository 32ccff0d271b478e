"""Opens the VAE of a model, and takes videos through its encoder and decoder and back."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import UInt8

from cogvideox_jax.conversion import diffusers, tensors
from cogvideox_jax.conversion.folder import SHIPPED, check_average, open_network, resolve
from cogvideox_jax.data import buckets
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.vae import PLANS, VAE, decode_stream, encode_stream
from cogvideox_jax.models.vae_config import VAEConfig
from cogvideox_jax.types import Params

CLASS = "AutoencoderKLCogVideoX"


class Training(NamedTuple):
  """How a VAE was trained; None where its folder does not say."""

  steps: int | None = None
  seconds: float | None = None  # The time of all steps, by the log; without compiling and saving.
  seed: int | None = None


class VAEModel(NamedTuple):
  """A VAE with its parameters in float32, as in sampling."""

  name: str  # As the user gave it.
  config: VAEConfig
  params: Params
  training: Training

  @property
  def parameters(self) -> int:
    """How many numbers its parameters are."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.params))

  @property
  def compression(self) -> str:
    """Height x width x time, as table 1 of the paper writes it: 8x8x4."""
    side = self.config.spatial_compression
    return f"{side}x{side}x{self.config.temporal_compression}"


def open_vae(name: str) -> VAEModel:
  """Opens the VAE of a shipped model, a model folder, a VAE's own folder, or train_vae's workdir.

  Raises:
    UserError: there is none, or it is damaged.
  """
  path = resolve(name)
  config, params = open_network("vae", _vae_folder(path))
  floats = jax.tree.map(partial(np.asarray, dtype=np.float32), tensors.materialize(params))
  return VAEModel(name, config, jax.device_put(floats), _training(path))


def _vae_folder(path: epath.Path) -> epath.Path:
  if (path / "vae").is_dir():
    return path / "vae"
  if _fields(path).get("_class_name") == CLASS:
    return path
  check_average(path, "vae")
  if (path / "checkpoints").is_dir():
    raise UserError(
      f"{path} has no vae/: train_vae writes it at its end.\nRun the same training again, which "
      "goes on, or set config.train.steps to the step that it has reached."
    )
  raise UserError(
    f"{path} holds no VAE.\nGive a shipped name ({', '.join(SHIPPED)}), a model folder, the folder "
    "of a VAE, or a workdir of train_vae."
  )


def _fields(path: epath.Path) -> dict[str, Any]:
  if not (path / diffusers.CONFIG).exists():
    return {}
  return diffusers.read_fields(path, diffusers.CONFIG)[0]


def _training(path: epath.Path) -> Training:
  """Reads what a workdir says of its training."""
  fields = _fields(path)
  steps = fields["train"].get("steps") if isinstance(fields.get("train"), dict) else None
  if steps is None:
    return Training()
  return Training(steps, _seconds(path / "metrics.jsonl"), fields.get("seed"))


def _seconds(log: epath.Path) -> float | None:
  """Adds up the time of steps. A line holds the mean over the steps since the line before."""
  if not log.exists():
    return None
  lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
  # A run that resumed has some steps twice; the later line counts.
  times = {line["step"]: line["step_seconds"] for line in lines if "step_seconds" in line}
  total, before = 0.0, 0
  for step in sorted(times):
    total += (step - before) * times[step]
    before = step
  return round(total, 3)


def check_size(vae: VAEModel, frames: int, height: int, width: int) -> None:
  """Raises UserError unless the VAE gives back as many frames, of the same size."""
  buckets.check([(height, width)], [frames], multiple_of=vae.config.spatial_compression)
  buckets.check_restored([frames], vae.config.temporal_compression)


def most_frames(vae: VAEModel, frames: int) -> int:
  """Returns the largest number up to `frames` of which the VAE gives as many back; at least 1."""
  step = math.lcm(4, 2 * vae.config.temporal_compression)  # As in `buckets.check_restored`.
  return (frames - 1) // step * step + 1


def reconstruct(
  vae: VAEModel, frames: UInt8[np.ndarray, "b F H W 3"]
) -> UInt8[np.ndarray, "b F H W 3"]:
  """Encodes clips, and decodes the means of their latents.

  Only a chunk's activations are in the device's memory, however long clips are.

  Raises:
    UserError: as `check_size`.
  """
  check_size(vae, *frames.shape[1:4])
  return np.concatenate(list(reconstruct_stream(vae, [frames], frames.shape[1])), axis=1)


def reconstruct_stream(
  vae: VAEModel, frames: Iterable[UInt8[np.ndarray, "b _ H W 3"]], num_frames: int
) -> Iterator[UInt8[np.ndarray, "b _ H W 3"]]:
  """Yields what `reconstruct` returns, some frames at a time, in the memory of two chunks.

  Args:
    frames: the clips' frames in order, any number at a time.
    num_frames: how many there are; `check_size` takes the number.
  """
  model, plan = nnx.merge(graph_of(VAE, vae.config), vae.params), PLANS["diffusers"]
  num_latents = (num_frames - 1) // vae.config.temporal_compression + 1
  pixels = (jnp.float32(chunk) / 127.5 - 1 for chunk in _cut(frames, plan.encode(num_frames), np))
  means = (mean for mean, _ in encode_stream(model, pixels))
  for found in decode_stream(model, _cut(means, plan.decode(num_latents), jnp)):
    yield np.asarray(jnp.uint8(jnp.rint(jnp.clip(found * 0.5 + 0.5, 0, 1) * 255)))


def _cut(arrays: Iterable[Any], ends: Sequence[int], xp: Any) -> Iterator[Any]:
  """Yields the frames or latents of some arrays, joined and cut at these ends.

  Args:
    xp: numpy or jax.numpy, whose arrays they are.
  """
  arrays, held, start = iter(arrays), [], 0
  for end in ends:
    while sum(part.shape[1] for part in held) < end - start:
      held.append(next(arrays))
    joined = held[0] if len(held) == 1 else xp.concatenate(held, axis=1)
    yield joined[:, : end - start]
    held, start = [joined[:, end - start :]], end
