"""Runs the frozen networks of a model folder, VAE and text encoder, on all devices of this host."""

import hashlib
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, UInt8

from cogvideox_jax import sharding
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.conversion.folder import ModelFolder
from cogvideox_jax.data.buckets import Bucket
from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.models import vae
from cogvideox_jax.models.graphs import compute_dtype, graph_of
from cogvideox_jax.models.t5 import T5Encoder, encode_text
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.types import Params

# The VAE takes at most BATCH_CLIPS clips of one bucket at once, and about BATCH_PIXELS pixels on
# each device, but always at least one clip on each device.
BATCH_CLIPS = 16
BATCH_PIXELS = 2**22
RULES = sharding.rules_named("fsdp")


class FrozenNetworks:
  """The VAE and the text encoder. Each device holds both, and computes its rows of every batch."""

  def __init__(self, folder: ModelFolder, config: TrainConfig):
    vae_config, vae_params = folder.vae()
    text_config, text_params = folder.text_encoder()
    self._mesh = sharding.local_mesh()
    everywhere = sharding.replicated(self._mesh)
    # The VAE computes in float32, as in sampling, because training learns to reproduce its latents.
    floats = jax.tree.map(partial(np.asarray, dtype=np.float32), vae_params)
    self._vae = nnx.merge(graph_of(VAE, vae_config), jax.device_put(floats, everywhere))
    self._text_params = jax.device_put(text_params, everywhere)
    self._text_graph = graph_of(T5Encoder, text_config, dtype=compute_dtype(config.dtype))
    self._tokenizer: Tokenizer = folder.tokenizer()
    self._text_length: int = config.model.text_length
    self.digest = _digest({"vae": vae_params, "text": text_params})

  def batch_size(self, bucket: Bucket) -> int:
    """Returns how many clips of a bucket `moments` takes at once."""
    pixels = bucket.num_frames * bucket.height * bucket.width
    devices = self._mesh.size
    return max(min(BATCH_PIXELS // pixels * devices, BATCH_CLIPS) // devices, 1) * devices

  def text(self, captions: Sequence[str]) -> Float[np.ndarray, "b l t"]:
    """Returns T5's states of any number of captions.

    They are encoded in batches of one size, so that only one program is compiled.
    """
    batch = self.batch_size(Bucket(1, 1, 1))
    ids = self._tokenizer.encode(list(captions), self._text_length)
    states = [
      encode_text(
        self._text_params,
        self._shared(fill(ids[start : start + batch], batch)),
        graphdef=self._text_graph,
      )
      for start in range(0, len(ids), batch)
    ]
    return np.concatenate(jax.device_get(states))[: len(captions)]

  def moments(
    self, frames: UInt8[np.ndarray, "b F H W 3"]
  ) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f h w c"]]:
    """Returns mean and log-variance of `batch_size` clips of one bucket.

    It does not wait for the devices.
    """
    return vae.encode(self._vae, jnp.float32(self._shared(frames)) / 127.5 - 1)

  def images(self, frames: Float32[np.ndarray, "b draws H W 3"]) -> Float[Array, "b draws 2 h w c"]:
    """Returns mean and log-variance of noised first frames; the VAE encodes each as a video."""
    moments = [
      vae.encode(self._vae, self._shared(frames[:, draw, None])) for draw in range(frames.shape[1])
    ]
    return jnp.stack([jnp.concatenate(pair, axis=1) for pair in moments], axis=1)

  def _shared(self, batch: np.ndarray) -> Array:
    return jax.device_put(batch, sharding.row_sharding(self._mesh, RULES, len(batch)))


def fill(batch: np.ndarray, size: int) -> np.ndarray:
  """Repeats a batch's last row until it has `size` rows, so that all batches have one shape."""
  return np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])


def _digest(params: Params) -> str:
  """Returns the sha256 of all arrays, in the order of their paths."""
  total = hashlib.sha256()
  for path, leaf in jax.tree.leaves_with_path(params):
    total.update(jax.tree_util.keystr(path).encode())
    total.update(np.asarray(leaf).tobytes())
  return total.hexdigest()
