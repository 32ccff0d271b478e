"""Opens and checks the encoded clips that a run trains on, and plans them as rows."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from etils import epath
from jaxtyping import Float

from cogvideox_jax import hosts
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.data import shape_clips
from cogvideox_jax.data.dataset_index import INDEX
from cogvideox_jax.data.left_out import StagePlan
from cogvideox_jax.data.loader import Loader
from cogvideox_jax.data.mixture import History
from cogvideox_jax.data.records import Dataset, stage_folder
from cogvideox_jax.data.rows import DroppedCaption, Rows
from cogvideox_jax.errors import UserError
from cogvideox_jax.frozen_networks import FrozenNetworks
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.precompute import encode_clips
from cogvideox_jax.training.stages import Stage

ENCODED = "data/encoded"  # The folder in a workdir for the embedded clips.


def make_data(config: TrainConfig, workdir: epath.Path) -> None:
  """Renders and encodes the embedded clips for all stages, if the config names no dataset.

  They are rendered for the stage with the largest clips. The other stages shrink and cut them.
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
  manifest = render()  # Finds the clips rendered, and returns their manifest.
  encode_clips.encode(config, manifest, workdir / ENCODED, config.components)


def open_data(config: TrainConfig, stage: str, workdir: epath.Path) -> dict[str, Dataset]:
  """Returns the datasets of a stage by their names in the mixture.

  Without a mixture there is one dataset, with the name of the stage that it was encoded for.

  Raises:
    UserError: there is no dataset, or a dataset of a mixture has no folder for each stage.
  """
  encoded_for = config.stages[stage].data or stage
  if config.data.mixture:
    paths = {name: epath.Path(source.path) for name, source in config.data.mixture.items()}
    for path in paths.values() if len(config.stages) > 1 else ():
      if (path / INDEX).exists():
        raise UserError(
          f"config.data.mixture: {path} is the dataset of one stage, but the config has "
          f"{len(config.stages)}.\nGive the folder above it, with a dataset for each stage."
        )
    return {name: Dataset(stage_folder(path, encoded_for)) for name, path in paths.items()}
  return {encoded_for: Dataset(epath.Path(config.data.path or workdir / ENCODED) / encoded_for)}


def data_digests(
  config: TrainConfig, stage: str, datasets: Mapping[str, Dataset]
) -> dict[str, str]:
  """Returns the digests of a stage's datasets by names that are unique in the run."""
  many = config.data.mixture and len(config.stages) > 1
  source = config.stages[stage].data or stage
  return {
    f"{name}/{source}" if many else name: dataset.digest for name, dataset in datasets.items()
  }


def weights(config: TrainConfig, stage: str) -> dict[str, int | float]:
  """Returns the weights of the datasets that `open_data` returns, by the same names."""
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
  """Returns the rows of each dataset of a stage.

  Args:
    split: train or validation.
    drop: the text states that replace those of a dropped caption.

  Raises:
    UserError: the clips do not fit the model.
  """
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
    drop=drop,
    drop_rate=config.text.drop_rate,
    validation_fraction=config.data.validation_fraction,
    split=split,
  )
  return {name: make(dataset, seed=_seed(config, name)) for name, dataset in datasets.items()}


def repeated_noise(config: TrainConfig, stage: Stage, datasets: Mapping[str, Rows]) -> list[str]:
  """Returns a line for each dataset whose noised first frames the stage sees more than once."""
  shares = weights(config, stage.name)
  rows = stage.steps * config.stages[stage.name].rows
  lines = []
  for name, dataset in datasets.items() if config.model.takes_image else ():
    copies = int(dataset.dataset.index.images.min())
    epochs = rows * shares[name] / sum(shares.values()) / dataset.per_epoch
    if epochs > copies:
      lines.append(
        f"Stage {stage.name} reads the clips of {dataset.dataset.directory} {epochs:.1f} times, "
        f"and {copies} noised copies of each first frame in turn. `encode` makes more with a "
        "larger --config.image.draws."
      )
  return lines


def _seed(config: TrainConfig, name: str) -> int:
  """Returns the seed of a dataset's rows.

  Each dataset of a mixture has its own. Otherwise datasets of one size would be shuffled alike, and
  drop the captions of the same clips.
  """
  if not config.data.mixture:
    return config.seed
  digest = hashlib.sha256(f"{config.seed} {name}".encode()).digest()
  return int.from_bytes(digest[:4])


def make_loader(
  config: TrainConfig,
  stage: str,
  datasets: Mapping[str, Rows],
  history: History,
  mine: Sequence[int] | None = None,
  plan: StagePlan | None = None,
) -> Loader:
  """Returns the batches of a stage.

  Args:
    mine: the rows of each batch that this host reads; None: all.
    plan: which batches and clips are left out; None: nothing.
  """
  return Loader(datasets, history, rows=config.stages[stage].rows, mine=mine, plan=plan)


def dropped_caption(config: TrainConfig) -> DroppedCaption:
  """Returns the text states of a dropped caption: zeros, or those of the empty prompt."""
  return "zeros" if config.text.drop == "zeros" else _empty_prompt(config)


def _empty_prompt(config: TrainConfig) -> Float[np.ndarray, "l t"]:
  return FrozenNetworks(open_model(config.components), config).text([""])[0]


def _check_clips(dataset: Dataset, model: DiTConfig) -> None:
  """Raises a UserError if the model cannot train on the clips of a dataset."""
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
