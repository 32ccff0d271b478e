"""Shows some clips above their reconstructions, as the VAE learns."""

from functools import partial

import jax
from etils import epath
from flax import nnx
from jaxtyping import Array, UInt8

from cogvideox_jax import hosts
from cogvideox_jax.data.contact_sheet import contact_sheet
from cogvideox_jax.models import vae
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.models.vae_config import VAEConfig
from cogvideox_jax.training.pixels import to_bytes, to_float
from cogvideox_jax.training.preview_files import preview_path
from cogvideox_jax.training.state import TrainState
from cogvideox_jax.training.vae_clips import Batches
from cogvideox_jax.types import Params

SHOWN_CLIPS = 4


class Previewer:
  """Reconstructs a few of the longest clips from the mean of their posterior, always the same."""

  def __init__(self, config: VAEConfig, batches: Batches, folder: epath.Path):
    self._folder = folder
    longest = max(range(batches.per_epoch), key=lambda k: batches.sizes_of(k).bucket.num_frames)
    self._clips = batches.batch(longest)[:SHOWN_CLIPS]
    self._reconstruct = jax.jit(partial(_reconstruct, graphdef=graph_of(VAE, config)))

  def write(self, step: int, state: TrainState) -> None:
    """Adds FOLDER/step_NNNNNN.png. Every process of a job calls it; the first one writes."""
    restored = hosts.whole(self._reconstruct(state.ema, self._clips))
    if restored is None or not hosts.is_first():
      return
    pairs = [frames for pair in zip(self._clips, restored, strict=True) for frames in pair]
    labels = ["clip", "reconstruction"] * len(self._clips)
    contact_sheet(pairs, labels, preview_path(self._folder, step, ".png"))


def _reconstruct(
  params: Params, clips: UInt8[Array, "b F H W 3"], *, graphdef: nnx.GraphDef
) -> UInt8[Array, "b F H W 3"]:
  model = nnx.merge(graphdef, params)
  mean, _ = vae.encode(model, to_float(clips))
  return to_bytes(vae.decode(model, mean))
