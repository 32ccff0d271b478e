"""How much explicit uniform timesteps lower the variance of a batch's loss.

python benchmarks/timesteps.py --json

Runs the shipped tiny transformer on the embedded clips, rendered and encoded in a temporary folder.
Both kinds of sampling see the same batches, latents and noise, and differ only in the timesteps.
`ratio` is the variance of the loss with plain sampling over that with explicit uniform sampling:
above 1, the latter is steadier. `fixed` repeats one batch with the same latents and noise. Only the
timesteps and the order of the rows vary, because a row's position decides its interval. Intervals
are 95%, by bootstrap over the batches.
"""

import itertools
import logging
import tempfile
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
from etils import epath

from cogvideox_jax.config.read import read
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.data import mixture
from cogvideox_jax.diffusion import objective as objectives
from cogvideox_jax.models.attention import attention
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.training import stage_data, step, step_functions
from cogvideox_jax.types import Batch
from configs import tiny

DRAWS = {"explicit": True, "plain": False}
RESAMPLES = 2000


def batches_of(config: TrainConfig, folder: epath.Path, count: int) -> list[Batch]:
  """The first batches of the training that a config describes."""
  (stage,) = config.stages
  stage_data.make_data(config, folder)
  datasets = stage_data.open_data(config, stage, folder)
  rows = stage_data.make_rows(config, stage, datasets, "train", stage_data.dropped_caption(config))
  history = mixture.begin(stage_data.weights(config, stage))
  loader = stage_data.make_loader(config, stage, rows, history)
  return list(itertools.islice(loader.iterate(), count))


def loss_function(config: TrainConfig) -> Any:
  """Returns a function (batch, row order, timestep key, latent key) -> loss by name of DRAWS."""
  model, params = open_model("tiny").transformer()
  network = step.Network(graph_of(DiT, model), model.width, attention)
  objective = step_functions.make_objective(config)
  params = jax.tree.map(jnp.asarray, params)

  @jax.jit
  def losses(params, batch, order, timestep_key, latent_key):
    batch = jax.tree.map(lambda x: x[order], batch)

    def one(explicit_uniform: bool):
      drawn_so = objective._replace(explicit_uniform=explicit_uniform)
      timed = objectives.draw_timesteps(drawn_so, batch, timestep_key)
      timed = timed._replace(rows=order)  # So that a row keeps its noise.
      denoise = step.denoiser(network, params, batch)
      tokens = objectives.vision_tokens(batch)
      return objectives.loss_share(drawn_so, denoise, timed, tokens, latent_key)

    return {name: one(explicit) for name, explicit in DRAWS.items()}

  return partial(losses, params)


def compare(losses: list[dict[str, jax.Array]]) -> dict[str, Any]:
  """The variances over the batches, and their ratio with its confidence interval."""
  explicit, plain = (np.array([float(each[name]) for each in losses]) for name in DRAWS)
  rng = np.random.default_rng(0)
  picks = rng.integers(len(losses), size=(RESAMPLES, len(losses)))
  ratios = plain[picks].var(axis=1) / explicit[picks].var(axis=1)
  return {
    "mean_explicit": explicit.mean(),
    "mean_plain": plain.mean(),
    "variance_explicit": explicit.var(),
    "variance_plain": plain.var(),
    "ratio": plain.var() / explicit.var(),
    "interval": np.quantile(ratios, [0.025, 0.975]).tolist(),
  }


def main() -> None:
  parser = measure.arguments(__doc__)
  parser.add_argument("--batches", type=int, default=1000)
  parser.add_argument("--clips", type=int, default=500, help="clips to render and encode")
  args = parser.parse_args()
  logging.getLogger("absl").setLevel(logging.ERROR)
  chosen, start = tiny.get_config(), time.perf_counter()
  chosen.update_from_flattened_dict({"data.clips": args.clips})
  config = read(TrainConfig, chosen)
  with tempfile.TemporaryDirectory() as folder:
    batches = batches_of(config, epath.Path(folder), args.batches)
  run = loss_function(config)
  keys = jax.random.split(jax.random.key(0), (args.batches, 2))
  rng, rows = np.random.default_rng(0), np.arange(config.stages["tiny"].rows)
  varied = [
    jax.block_until_ready(run(jax.tree.map(jnp.asarray, batch), rows, *pair))
    for batch, pair in zip(batches, keys, strict=True)
  ]
  batch = jax.tree.map(jnp.asarray, batches[0])
  fixed = [
    jax.block_until_ready(run(batch, rng.permutation(rows), pair[0], keys[0, 1])) for pair in keys
  ]
  result = {
    **measure.device("jax", "flax", "numpy"),
    "batches": args.batches,
    "rows": len(rows),
    "clips_a_batch": np.mean([batch.segment_ids.max(axis=1).sum() for batch in batches]),
    **compare(varied),
    "fixed": compare(fixed),
    "seconds": time.perf_counter() - start,
  }
  measure.report(jax.tree.map(lambda x: x if isinstance(x, str) else float(x), result), args.json)


if __name__ == "__main__":
  main()
