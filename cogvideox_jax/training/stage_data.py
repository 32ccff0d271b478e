"""The encoded clips that a run trains on: opened, checked, planned as rows."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from etils import epath
from jaxtyping import Float

from cogvideox_jax import hosts
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.data import shape_clips
from cogvideox_jax.data.loader import Loader
from cogvideox_jax.data.mixture import History
from cogvideox_jax.data.records import INDEX, Dataset, stage_folder
from cogvideox_jax.data.rows import DroppedCaption, Rows
from cogvideox_jax.errors import UserError
from cogvideox_jax.frozen_networks import FrozenNetworks
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.precompute import encode_clips

ENCODED = "data/encoded"  # Where in a workdir the embedded clips are.


def make_data(config: TrainConfig, workdir: epath.Path) -> None:
  """Renders and encodes the embedded clips for all stages, if the config names no dataset.

  They are rendered for the stage of the largest clips: others make them smaller, and cut them.
  """
  if config.data.path or config.data.mixture:
    return
  largest = max(config.stages.values(), key=lambda stage: max(h * w for h, w in stage.sizes))
  render = partial(
    shape_clips.render_dataset,
    workdir / "data" / "clips",
    config.data.clips,
    config.seed,
    sizes=largest.sizes,
    durations=largest.durations,
    fps=config.data.fps,
  )
  if hosts.is_first():
    render()
  hosts.wait("rendered")
  manifest = render()  # Which finds it done.
  encode_clips.encode(config, manifest, workdir / ENCODED, config.components)


def open_data(config: TrainConfig, stage: str, workdir: epath.Path) -> dict[str, Dataset]:
  """The encoded clips of a stage, by the names of its mixture or that of the stage they are of.

  Raises:
    UserError: there are none, or the one dataset of a mixture stands for all stages.
  """
  source = config.stages[stage].data or stage
  if config.data.mixture:
    paths = {name: epath.Path(part.path) for name, part in config.data.mixture.items()}
    for path in paths.values() if len(config.stages) > 1 else ():
      if (path / INDEX).exists():
        raise UserError(
          f"config.data.mixture: {path} is the dataset of one stage, but the config has "
          f"{len(config.stages)}.\nGive the folder above it, with a dataset for each stage."
        )
    return {name: Dataset(stage_folder(path, source)) for name, path in paths.items()}
  return {source: Dataset(epath.Path(config.data.path or workdir / ENCODED) / source)}


def data_digests(
  config: TrainConfig, stage: str, datasets: Mapping[str, Dataset]
) -> dict[str, str]:
  """By names that no other dataset of the run has."""
  many = config.data.mixture and len(config.stages) > 1
  source = config.stages[stage].data or stage
  return {
    f"{name}/{source}" if many else name: dataset.digest for name, dataset in datasets.items()
  }


def weights(config: TrainConfig, stage: str) -> dict[str, int | float]:
  """Of the datasets that `open_data` gives."""
  if config.data.mixture:
    return {name: source.weight for name, source in config.data.mixture.items()}
  return {config.stages[stage].data or stage: 1}


def make_rows(
  config: TrainConfig,
  stage: str,
  datasets: Mapping[str, Dataset],
  split: str,
  drop: DroppedCaption,
) -> dict[str, Rows]:
  """A stage's rows of each dataset; a UserError if the clips are not such as the model takes."""
  settings = config.stages[stage]
  model = config.model
  for dataset in datasets.values():
    _check_clips(dataset, model)
  make = partial(
    Rows,
    row_tokens=settings.row_tokens,
    max_clips=settings.max_clips,
    best=settings.best,
    patch=model.patch,
    with_images=model.takes_image,
    seed=config.seed,
    drop=drop,
    drop_rate=config.text.drop_rate,
    validation_fraction=config.data.validation_fraction,
    split=split,
  )
  return {name: make(dataset) for name, dataset in datasets.items()}


def make_loader(
  config: TrainConfig,
  stage: str,
  datasets: Mapping[str, Rows],
  history: History,
  mine: Sequence[int] | None = None,
) -> Loader:
  """Batches of a stage, of the rows that this host reads: `mine`; None is all of the batch."""
  return Loader(datasets, history, rows=config.stages[stage].rows, mine=mine)


def dropped_caption(config: TrainConfig) -> DroppedCaption:
  return "zeros" if config.text.drop == "zeros" else _empty_prompt(config)


def _empty_prompt(config: TrainConfig) -> Float[np.ndarray, "l t"]:
  return FrozenNetworks(open_model(config.components), config).text([""])[0]


def _check_clips(dataset: Dataset, model: DiTConfig) -> None:
  channels, text = dataset.index.latent_shape[0, 3], tuple(dataset.index.text_shape[0].tolist())
  for what, has, wants in (
    ("latent channels", int(channels), model.out_channels),
    ("text states (tokens, width)", text, (model.text_length, model.text_width)),
  ):
    if has != wants:
      raise UserError(
        f"The clips of {dataset.directory} have {what} {has}, but config.model says {wants}.\n"
        "Encode them with this config's components, or give the config they were encoded with."
      )
  if model.takes_image and not dataset.index.images.all():
    raise UserError(
      f"The clips of {dataset.directory} were encoded without their first frames, but config.model "
      "sees an image\n(in_channels is not out_channels). Encode them again with this config."
    )
  if model.learned_positions:
    _check_sample_size(dataset, model)


def _check_sample_size(dataset: Dataset, model: DiTConfig) -> None:
  latents = dataset.index.latent_shape[:, :3]
  wanted = (model.sample_frames - 1) // 4 + 1, model.sample_height, model.sample_width
  if (other := (latents != np.array(wanted)).any(axis=1)).any():
    clip = int(np.argmax(other))
    raise UserError(
      f"{dataset.source(clip)!r} in {dataset.directory} has (f, h, w) latents "
      f"{tuple(latents[clip].tolist())}, but config.model has\n"
      f"learned positions, which fix them to {wanted}: encode clips of its sample size alone."
    )
