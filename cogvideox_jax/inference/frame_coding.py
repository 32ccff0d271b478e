"""The VAE's phases of sampling: given frames become latents, and latents become frames."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jaxtyping import Array, Float, Float32

from cogvideox_jax.conversion import tensors
from cogvideox_jax.inference import out_of_memory
from cogvideox_jax.inference.checks import check_finite
from cogvideox_jax.inference.noise_draws import POSTERIOR
from cogvideox_jax.inference.offload import loaded_for, put
from cogvideox_jax.inference.progress import Progress
from cogvideox_jax.inference.request import Request
from cogvideox_jax.inference.videos import chunks
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.tiling import Tiling
from cogvideox_jax.models.vae import VAE, decode, encode, sample_posterior
from cogvideox_jax.models.vae_config import VAEConfig
from cogvideox_jax.types import Params


class FrameCoder:
  """The VAE with its parameters in fp32, and how it saves memory."""

  def __init__(self, vae: tuple[VAEConfig, Params], *, sharding: Sharding, on_host: bool):
    """Puts the parameters in the memory of the sharding's devices, or in that of their host."""
    self.config, params = vae
    self.tiling: Tiling | None = None
    self.slicing = False
    floats = jax.tree.map(partial(np.asarray, dtype=np.float32), tensors.materialize(params))
    self.params = put(floats, sharding, on_host)
    self._graphdef = graph_of(VAE, self.config)

  def encode(
    self, request: Request, frames: Float[np.ndarray, "prompts F H W 3"]
  ) -> list[Float[Array, "chunk f h w c"]]:
    """Samples the posterior's latents, not scaled, of each video's given frames, by chunks.

    frames: of each prompt's image (one frame) or video, in [-1, 1].
    """
    latents = []
    with loaded_for(out_of_memory.GIVEN, self.params, tiling=self.tiling is not None) as params:
      vae = nnx.merge(self._graphdef, params)
      for chunk in request.chunks:
        mean, logvar = encode(vae, jnp.asarray(frames[chunk.prompts]), tiling=self.tiling)
        noise = request.draw(chunk, POSTERIOR, mean.shape[1:])
        latents.append(sample_posterior(mean, logvar, noise))
      return jax.block_until_ready(latents)

  def decode(
    self, latents: Float[Array, "b f h w c"], batch_size: int | None, progress: Progress
  ) -> Float32[np.ndarray, "b F H W 3"]:
    """Returns frames in [0, 1] on the host.

    Args:
      latents: scaled, without extra frames.
      batch_size: videos that are decoded at once; None decodes all, `slicing` one.
    """
    batches = chunks(len(latents), 1 if self.slicing else batch_size)
    videos = []
    with (
      progress.phase("decode", len(batches)) as bar,
      loaded_for(out_of_memory.DECODE, self.params, tiling=self.tiling is not None) as params,
    ):
      vae = nnx.merge(self._graphdef, params)
      for batch in batches:
        frames = decode(vae, latents[batch] / self.config.scaling_factor, tiling=self.tiling)
        check_finite("The decoded video", frames, "The VAE is damaged: fetch it again.")
        videos.append(np.asarray(jnp.clip(frames / 2 + 0.5, 0, 1)))
        bar.update()
    return np.concatenate(videos)[: len(latents)]
