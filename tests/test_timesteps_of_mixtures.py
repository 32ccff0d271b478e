"""What the clips of each dataset of a mixture are noised to, from the loader to the draw."""

from functools import partial

import jax
import numpy as np
import pytest
from drawn import NOISE
from etils import epath
from small_run import TEXT, write_dataset

from cogvideox_jax.data import mixture
from cogvideox_jax.data.loader import Loader
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.rows import Rows
from cogvideox_jax.diffusion.latents import LatentConfig
from cogvideox_jax.diffusion.noise import noise_schedule
from cogvideox_jax.diffusion.objective import Objective, draw_timesteps

BATCHES, STEPS, MAX_CLIPS = 300, NOISE.steps, 3
GRIDS = {"images": ((1, 4, 4),), "videos": ((3, 4, 4), (2, 4, 4))}
OBJECTIVE = Objective(
  noise_schedule(NOISE),
  LatentConfig((1, 2, 2), 1.0, 1.0, 0.0),
  explicit_uniform=True,
  weighting="clips",
)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
  folder = epath.Path(tmp_path_factory.mktemp("datasets"))
  found = {}
  for name, grids in GRIDS.items():
    write_dataset(folder / name, seed=0, clips=24, grids=grids)
    found[name] = Rows(
      Dataset(folder / name),
      row_tokens=3 * (TEXT[0] + 4),
      max_clips=MAX_CLIPS,
      patch=(1, 2, 2),
      seed=0,
      drop="zeros",
      drop_rate=0.1,
      validation_fraction=0.0,
    )
  return found


def drawn(datasets, weights, rows):
  """(dataset, row of the batch, tokens of the clip, timestep) of every clip of BATCHES batches."""
  loader = Loader(datasets, mixture.begin(weights), rows=rows)
  draw = jax.jit(partial(draw_timesteps, OBJECTIVE))
  found = []
  for k in range(BATCHES):
    # As the training step folds its number in.
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(3), k))
    timesteps = np.asarray(draw(loader.batch(k), key).timesteps)
    for number, index in enumerate(loader.rows_of(k)):
      name, row = loader.row(index)
      for segment, clip in enumerate(row.clips, start=1):
        length = int(datasets[name].lengths[clip])
        found.append((name, number, length, int(timesteps[number, segment]), k))
  return found


def check_uniform(timesteps):
  """Kolmogorov-Smirnov at the 0.1% level."""
  values = np.sort(np.array(timesteps))
  assert len(values) >= 100
  above = np.arange(1, len(values) + 1) / len(values) - (values + 1) / STEPS
  below = values / STEPS - np.arange(len(values)) / len(values)
  assert max(above.max(), below.max()) < 1.95 / np.sqrt(len(values))


@pytest.mark.parametrize(
  ("rows", "weights"),
  [
    pytest.param(2, {"images": 1, "videos": 1}, marks=pytest.mark.slow),
    pytest.param(4, {"images": 1, "videos": 3}, marks=pytest.mark.slow),
    (6, {"images": 2, "videos": 3}),
  ],
)
def test_the_clips_of_each_dataset_length_and_row_see_all_timesteps(datasets, rows, weights):
  groups = {}
  for name, row, length, timestep, k in drawn(datasets, weights, rows):
    for group in (name, (name, length), (name, row)):
      # One clip of a row, because those of one row share an interval.
      groups.setdefault(group, {}).setdefault((k, row), timestep)
  for timesteps in groups.values():
    check_uniform(list(timesteps.values()))


def test_each_batch_has_one_row_in_each_interval(datasets):
  clips = drawn(datasets, {"images": 1, "videos": 3}, 4)
  for k in range(BATCHES):
    of_row = {}
    for _, row, _, timestep, batch in clips:
      if batch == k:
        of_row.setdefault(row, set()).add(timestep // (STEPS // 4))
    assert sorted(map(sorted, of_row.values())) == [[0], [1], [2], [3]]
