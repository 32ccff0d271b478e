"""How much explicit uniform timesteps lower the variance of a batch's loss.

python benchmarks/timesteps.py --json

Runs the shipped tiny transformer on the embedded clips, rendered and encoded in a temporary folder.
All DRAWS see the same batches, latents and noise, and differ only in the timesteps. `ratio` is the
variance of the loss with plain sampling over that with another: above 1, the latter is steadier.
Both weightings of the loss are measured. `fixed` repeats one batch with the same latents and noise,
so that only the timesteps vary. Intervals are 95%, by bootstrap over the batches.
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
from cogvideox_jax.diffusion import timesteps as sampling
from cogvideox_jax.models.attention import attention
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.training import stage_data, step, step_functions
from cogvideox_jax.types import Batch
from configs import tiny


def in_proportion(
  key: jax.Array, clips: jax.Array, segments: int, steps: int, tokens: jax.Array
) -> jax.Array:
  """Draws timesteps as explicit uniform sampling does, but in parts of a row's interval that are in
  proportion to the clips' tokens [b s].

  In random order, long parts cover the middle of the interval more often than its ends. A random
  turn, past its end and on from its start, makes each clip's timestep uniform.
  """
  interval_key, order_key, inside_key, turn_key = jax.random.split(key, 4)
  rows, is_clip = len(clips), tokens > 0
  lot = jnp.where(is_clip, jax.random.uniform(order_key, is_clip.shape), 2.0)
  share = tokens / jnp.maximum(tokens.sum(1, keepdims=True), 1)
  before = jnp.where(lot[:, :, None] > lot[:, None, :], share[:, None, :], 0).sum(2)
  inside = jax.random.uniform(inside_key, is_clip.shape)
  within = jnp.mod(before + share * inside + jax.random.uniform(turn_key, (rows, 1)), 1.0)
  intervals = sampling.intervals_of_rows(interval_key, rows)
  return jnp.where(is_clip, sampling.in_intervals(intervals, within, steps), 0)


DRAWS = ("plain", "explicit", "in_proportion")
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
  """Returns a function (batch, timestep key, latent key) -> loss by (weighting, draw)."""
  model, params = open_model("tiny").transformer()
  network = step.Network(graph_of(DiT, model), model.width, attention)
  objective = step_functions.make_objective(config)
  steps = len(objective.schedule.alphas_cumprod)
  params = jax.tree.map(jnp.asarray, params)

  def timesteps_of(draw: str, batch: Batch, key: jax.Array) -> jax.Array:
    clips, tokens = batch.segment_ids.max(axis=1), batch.grids.prod(axis=2)
    tokens = jnp.where((segment := jnp.arange(tokens.shape[1])) <= clips[:, None], tokens, 0)
    tokens = jnp.where(segment > 0, tokens, 0)
    if draw == "in_proportion":
      return in_proportion(key, clips, len(segment), steps, tokens)
    chosen = sampling.explicit_uniform if draw == "explicit" else sampling.uniform
    return chosen(key, clips, len(segment), steps)

  @jax.jit
  def losses(params, batch, timestep_key, latent_key):
    def one(weighting: str, draw: str):
      weighed = objective._replace(weighting=weighting)
      timesteps = timesteps_of(draw, batch, timestep_key)
      timed = objectives.TimedBatch(batch, timesteps, jnp.arange(len(timesteps)))
      denoise = step.denoiser(network, params, batch)
      count = objectives.counted(batch, weighting)
      return objectives.loss_share(weighed, denoise, timed, count, latent_key)

    return {pair: one(*pair) for pair in itertools.product(objectives.WEIGHTINGS, DRAWS)}

  return partial(losses, params)


def compare(losses: list[dict[tuple[str, str], jax.Array]]) -> dict[str, Any]:
  """The means and variances over the batches, and their ratios with confidence intervals."""
  values = {pair: np.array([float(each[pair]) for each in losses]) for pair in losses[0]}
  picks = np.random.default_rng(0).integers(len(losses), size=(RESAMPLES, len(losses)))
  found = {}
  for (weighting, draw), drawn in values.items():
    plain = values[weighting, "plain"]
    ratios = plain[picks].var(axis=1) / drawn[picks].var(axis=1)
    found[f"{weighting}, {draw}"] = {
      "mean": drawn.mean(),
      "variance": drawn.var(),
      "ratio": plain.var() / drawn.var(),
      "interval": np.quantile(ratios, [0.025, 0.975]).tolist(),
    }
  return found


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
  varied = [
    jax.block_until_ready(run(jax.tree.map(jnp.asarray, batch), *pair))
    for batch, pair in zip(batches, keys, strict=True)
  ]
  batch = jax.tree.map(jnp.asarray, batches[0])
  fixed = [jax.block_until_ready(run(batch, pair[0], keys[0, 1])) for pair in keys]
  result = {
    **measure.device("jax", "flax", "numpy"),
    "batches": args.batches,
    "rows": len(batches[0].segment_ids),
    "clips_a_batch": np.mean([batch.segment_ids.max(axis=1).sum() for batch in batches]),
    "varied": compare(varied),
    "fixed": compare(fixed),
    "seconds": time.perf_counter() - start,
  }
  measure.report(jax.tree.map(lambda x: x if isinstance(x, str) else float(x), result), args.json)


if __name__ == "__main__":
  main()
