"""Describes an encoded dataset as training would read it: its rows, and a picture of its clips."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float

from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.data import mixture, pictures
from cogvideox_jax.data.loader import Loader
from cogvideox_jax.data.pictures import Image8, Tile
from cogvideox_jax.data.records import Dataset, stage_folder
from cogvideox_jax.data.rows import Rows
from cogvideox_jax.errors import UserError
from cogvideox_jax.models import vae
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.training import resume, stage_data
from cogvideox_jax.training.pixels import to_bytes

SHEET_CLIPS, DRAWN_ROWS = 24, 32  # Clips on a page, and rows in the picture of the packing.
PARENTS = 3  # Folders from WORKDIR/data/encoded/STAGE up to WORKDIR, which holds config.json.


def open_stages(path: epath.Path) -> dict[str, Dataset]:
  """Returns the datasets by stage.

  Args:
    path: the folder that `encode` wrote, or the folder of one stage in it.

  Raises:
    UserError: there is no dataset, or it is unfinished.
  """
  if (path / "index.npz").exists() or not path.is_dir():
    return {path.name: Dataset(path)}
  stages = sorted(folder for folder in path.iterdir() if (folder / "index.npz").exists())
  if not stages:
    raise UserError(
      f"{path} holds no encoded dataset: no finished one, nor a folder of stages.\n"
      "Make one with `python -m cogvideox_jax.encode`; the same command finishes it."
    )
  return {folder.name: Dataset(folder) for folder in stages}


def kept_config(path: epath.Path) -> TrainConfig | None:
  """Returns the config beside a dataset, from `encode`, or in the workdir of a training; or None.

  Raises:
    UserError: it is damaged.
  """
  for folder in (path, *list(path.parents)[:PARENTS]):
    kept = folder / resume.CONFIG_FILE
    if not kept.exists():
      continue
    # A config.json without stages belongs to something else, such as a model.
    if "stages" in resume.read_fields(kept, "Give the config by --config=."):
      return resume.read_config(folder)
  return None


def readers(config: TrainConfig, datasets: Iterable[str], wanted: str) -> dict[str, str]:
  """Returns the stage of the config that reads each dataset; datasets that none reads are left out.

  Args:
    wanted: a stage; "": each dataset is read by the stage of its name, or if there is one dataset
      and one stage, by that stage.

  Raises:
    UserError: the config has no such stage, or its dataset is not among those given.
  """
  names = list(datasets)
  if not wanted:
    if len(names) == len(config.stages) == 1:
      return {names[0]: min(config.stages)}
    return {name: name for name in names if name in config.stages}
  if wanted not in config.stages:
    raise UserError(f"--stage={wanted}: config.stages has {', '.join(sorted(config.stages))}.")
  source = names[0] if len(names) == 1 else config.stages[wanted].data or wanted
  if source not in names:
    raise UserError(f"--stage={wanted} reads {source}, but here there are {', '.join(names)}.")
  return {source: wanted}


def training_rows(config: TrainConfig, stage: str, dataset: Dataset) -> Rows:
  """Returns the rows that a stage trains on. They do not depend on which captions it drops."""
  name = _name_in_mixture(config, stage, dataset)
  (rows,) = stage_data.make_rows(config, stage, {name: dataset}, "train", "zeros").values()
  return rows


def _name_in_mixture(config: TrainConfig, stage: str, dataset: Dataset) -> str:
  """Returns the name by which a stage's mixture knows a dataset; empty if it does not."""
  encoded_for = config.stages[stage].data or stage
  for name, source in config.data.mixture.items():
    if dataset.directory == stage_folder(epath.Path(source.path), encoded_for):
      return name
  return ""


def list_rows(
  config: TrainConfig, stage: str, rows: Rows, wanted: range, hosts: int
) -> list[dict[str, Any]]:
  """Returns rows of a stage in their global order, with the host that reads each.

  It assumes that no row is split over hosts, and that host h reads the h-th of the equal runs of
  each batch.

  Args:
    wanted: the numbers of the rows.
    hosts: how many hosts read the stage.

  Raises:
    UserError: the hosts cannot share the global batch.
  """
  count = config.stages[stage].rows
  if count % hosts:
    raise UserError(f"a batch of {count} rows cannot be shared equally by {hosts} hosts")
  history = mixture.begin({"": 1})
  found = []
  for host in range(hosts):
    mine = range(host * count // hosts, (host + 1) * count // hosts)
    loader = Loader({"": rows}, history, rows=count, mine=mine)
    for k in range(wanted.start // count, -(-wanted.stop // count)):
      for index in loader.rows_of(k):
        if index in wanted:
          _, row = loader.row(index)
          clips = [rows.dataset.source(clip) for clip in row.clips.tolist()]
          found.append({"row": index, "epoch": row.epoch, "host": host, "clips": clips})
  return sorted(found, key=lambda row: row["row"])


def write_clip_sheet(dataset: Dataset, model: str, title: str, path: epath.Path) -> None:
  """Writes a page with the first frames and captions of clips, spread evenly over the dataset.

  The first latent frame holds only the first frame of pixels, so it can be decoded alone. Without a
  model the page shows the latents in false colours, and says so.

  Args:
    model: a model folder or shipped name with the VAE that encoded the clips; "": none.
  """
  count = min(SHEET_CLIPS, len(dataset))
  clips = np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(int)).tolist()
  examples = [dataset[clip] for clip in clips]
  latents = [example.mean[0] for example in examples]
  shown = decode_first_frames(latents, model) if model else pictures.false_colours(latents)
  how = f"first frames, decoded by {model}" if model else "latents in FALSE COLOURS: no --model"
  tiles = [
    Tile(image, [f"{one.num_frames} x {one.height}x{one.width}", one.source, one.caption])
    for image, one in zip(shown, examples, strict=True)
  ]
  pictures.clip_sheet(tiles, f"{title}: {how}", path)


def decode_first_frames(latents: Sequence[Float[np.ndarray, "_ _ c"]], model: str) -> list[Image8]:
  """Decodes the first latent frame of each clip.

  Raises:
    UserError: the model's VAE has another number of latent channels.
  """
  config, params = open_model(model).vae()
  if config.latent_channels != latents[0].shape[-1]:
    raise UserError(
      f"The VAE of {model} has {config.latent_channels} latent channels, the clips have "
      f"{latents[0].shape[-1]}.\nGive the model they were encoded with, or --model= for none."
    )
  floats = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), params)
  network = nnx.merge(graph_of(VAE, config), floats)
  frames = [vae.decode(network, jnp.asarray(one[None, None], jnp.float32))[0, 0] for one in latents]
  return [np.asarray(to_bytes(frame)) for frame in frames]
