"""From a config to everything that a training run needs, each part checked before any compile."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from cogvideox_jax import encoding, hosts, sharding
from cogvideox_jax.conversion import component_fields, diffusers
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.data import shapes
from cogvideox_jax.data.loader import Loader
from cogvideox_jax.data.mixture import History
from cogvideox_jax.data.records import INDEX, Dataset, stage_folder
from cogvideox_jax.data.rows import DroppedCaption, Rows
from cogvideox_jax.diffusion.latents import LatentConfig
from cogvideox_jax.diffusion.noise import NoiseConfig, noise_schedule
from cogvideox_jax.encoders import Encoders
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.backends import attention_for
from cogvideox_jax.models.dit import DiT, DiTConfig
from cogvideox_jax.models.graphs import compute_dtype, graph_of
from cogvideox_jax.models.vae import VAEConfig
from cogvideox_jax.training import checkpoint, stages, state
from cogvideox_jax.training.stages import model_config
from cogvideox_jax.training.state import Params, TrainState
from cogvideox_jax.training.step import Accumulation, Network, train_step, validation_step
from cogvideox_jax.types import Batch

ENCODED = "data/encoded"  # Where in a workdir the embedded clips are.


class Functions(NamedTuple):
  """The run's functions of arrays alone."""

  abstract: TrainState  # Shapes and shardings of a state.
  create: Callable[[Key[Array, ""]], TrainState]
  train: Callable[..., Any]  # (state, batch, key) -> (state, metrics), not jitted; so is validate:
  validate: Callable[..., Any]  # (params, batch, key, timesteps) -> losses


def make_mesh(
  config: ConfigDict, stage: str, devices: Sequence[Any] | None = None
) -> tuple[Mesh, sharding.Rules]:
  """The mesh of a stage, over all devices of the job or those given, and what it splits."""
  devices = jax.devices() if devices is None else devices
  sizes = sharding.with_context(dict(config.mesh), config.stages[stage].context, devices)
  return sharding.make_mesh(sizes, devices), sharding.rules_named(config.sharding)


def make_data(config: ConfigDict, workdir: epath.Path) -> None:
  """Renders and encodes the embedded clips for all stages, if the config names no dataset.

  They are rendered for the stage of the largest clips: others make them smaller, and cut them.
  """
  if config.data.path or config.data.mixture:
    return
  largest = max(config.stages.values(), key=lambda stage: max(h * w for h, w in stage.sizes))
  render = partial(
    shapes.render_dataset,
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
  encoding.encode(config, manifest, workdir / ENCODED, config.components)


def open_data(config: ConfigDict, stage: str, workdir: epath.Path) -> dict[str, Dataset]:
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


def data_digests(config: ConfigDict, stage: str, datasets: Mapping[str, Dataset]) -> dict[str, str]:
  """By names that no other dataset of the run has."""
  many = config.data.mixture and len(config.stages) > 1
  source = config.stages[stage].data or stage
  return {
    f"{name}/{source}" if many else name: dataset.digest for name, dataset in datasets.items()
  }


def weights(config: ConfigDict, stage: str) -> dict[str, int | float]:
  """Of the datasets that `open_data` gives."""
  if config.data.mixture:
    return {name: source.weight for name, source in config.data.mixture.items()}
  return {config.stages[stage].data or stage: 1}


def make_rows(
  config: ConfigDict,
  stage: str,
  datasets: Mapping[str, Dataset],
  split: str,
  drop: DroppedCaption,
) -> dict[str, Rows]:
  """A stage's rows of each dataset; a UserError if the clips are not such as the model takes."""
  settings = config.stages[stage]
  model = model_config(config)
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
  config: ConfigDict,
  stage: str,
  datasets: Mapping[str, Rows],
  history: History,
  mine: Sequence[int] | None = None,
) -> Loader:
  """Batches of a stage, of the rows that this host reads: `mine`; None is all of the batch."""
  return Loader(datasets, history, rows=config.stages[stage].rows, mine=mine)


def dropped_caption(config: ConfigDict) -> DroppedCaption:
  return "zeros" if config.text.drop == "zeros" else _empty_prompt(config)


def make_functions(config: ConfigDict, stage: str, mesh: Mesh, rules: sharding.Rules) -> Functions:
  """What the loop compiles for a stage; `config.components` gives the scale of the latents."""
  model = stages.stage_model(config, stage)
  device = mesh.devices.flat[0]
  dtype = compute_dtype(config.dtype, device.platform)
  network = Network(
    graph_of(DiT, model, dtype=dtype, remat=config.remat),
    model.width,
    sharding.shard_attention(attention_for(device), mesh, rules),
  )
  tx = stages.make_optimizer(config, stage)
  draw = partial(_draw_params, model)
  shapes = jax.eval_shape(draw, jax.random.key(0))
  abstract = state.abstract(shapes, tx, mesh, rules)
  parts = _parts(config.stages[stage], mesh, rules)
  shared = {
    "network": network,
    "schedule": noise_schedule(NoiseConfig(**config.noise)),
    "latents": latent_config(config),
    "accumulation": Accumulation(
      split=partial(sharding.split_rows, parts=parts, mesh=mesh, rules=rules),
      pin=partial(jax.lax.with_sharding_constraint, shardings=state.shardings_of(abstract).params),
    ),
  }

  def create(key: Key[Array, ""]) -> TrainState:
    if not config.init_from:
      return state.create(draw, key, tx, abstract)
    params = load_initial(config.init_from, shapes)
    params = jax.device_put(params, state.shardings_of(abstract).params)
    return state.create(lambda given: given, params, tx, abstract)

  return Functions(
    abstract=abstract,
    create=create,
    train=partial(
      train_step,
      tx=tx,
      learning_rate=stages.learning_rate(config, stage),
      ema_decay=config.optimizer.ema_decay,
      explicit_uniform=config.train.explicit_uniform,
      **shared,
    ),
    validate=partial(validation_step, **shared),
  )


def _parts(stage: ConfigDict, mesh: Mesh, rules: sharding.Rules) -> int:
  """In how many parts a step computes with a batch, one after the other."""
  sharding.row_sharding(mesh, rules, stage.rows)  # Checks that the rows divide.
  rows = stage.rows // sharding.row_shards(mesh, rules)
  at_once = stage.rows_at_once or rows
  if rows % at_once:
    raise UserError(
      f"each device has {rows} rows of a batch of {stage.rows}, which a step cannot take "
      f"{at_once} at once.\nMake the stage's `rows_at_once` a divisor of {rows}, or 0 for all."
    )
  return rows // at_once


def abstract_batch(config: ConfigDict, stage: str, mesh: Mesh, rules: sharding.Rules) -> Batch:
  """Shapes, types and shardings of a stage's global batch, as the loader gives it for clips that
  `encode` made."""
  model, sizes = model_config(config), config.stages[stage]
  rows, tokens, clips = sizes.rows, sizes.row_tokens, sizes.max_clips
  frame_width = model.out_channels * math.prod(model.patch[1:])

  def array(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct((rows, *shape), dtype)

  batch = Batch(
    mean=array(jnp.float16, tokens, model.patch[0] * frame_width),
    logvar=array(jnp.float16, tokens, model.patch[0] * frame_width),
    text=array(jnp.bfloat16, clips, model.text_length, model.text_width),
    segment_ids=array(jnp.int32, tokens),
    experts=array(jnp.int32, tokens),
    coordinates=array(jnp.int32, tokens, 3),
    grids=array(jnp.int32, clips + 1, 3),
    extra=array(jnp.int32, clips + 1) if model.patch[0] > 1 else None,
    image=array(jnp.float16, tokens, 2, frame_width) if model.takes_image else None,
  )
  places = sharding.batch_shardings(batch, mesh, rules)
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), batch, places
  )


def _draw_params(model: DiTConfig, key: Key[Array, ""]) -> Params:
  return nnx.to_pure_dict(nnx.state(DiT(model, rngs=nnx.Rngs(key)), nnx.Param))


def load_initial(source: str, wanted: Params) -> Params:
  """The transformer of a model folder, or the average of a workdir, as fp32 host arrays.

  Raises:
    UserError: there is none, or its arrays are not those `wanted`.
  """
  if (epath.Path(source) / "checkpoints").is_dir():
    params = checkpoint.load_weights(source)
  else:
    params = open_model(source).transformer()[1]
  found, shapes_wanted = map(checkpoint.flatten, (params, wanted))
  for name in sorted(found.keys() | shapes_wanted.keys()):
    has = found[name].shape if name in found else None
    wants = shapes_wanted[name].shape if name in shapes_wanted else None
    if has != wants:
      raise UserError(
        f"config.init_from={source} has another transformer than config.model: {name} is "
        f"{has or 'absent'} there and {wants or 'absent'} here.\nMake config.model the same as its."
      )
  return jax.tree.map(partial(np.asarray, dtype=np.float32), params)


def latent_config(config: ConfigDict) -> LatentConfig:
  """How the transformer sees latents of the VAE of `vae_config`."""
  vae = vae_config(config)
  return LatentConfig(
    patch=tuple(config.model.patch),
    scaling_factor=vae.scaling_factor,
    image_scale=vae.image_scale(config.image.scale),
    image_drop_rate=config.image.drop_rate,
  )


def vae_config(config: ConfigDict) -> VAEConfig:
  """Of `config.components`; if that is empty the published one, which programs can be made for."""
  if not config.components:
    return VAEConfig()
  fields, where = diffusers.read_fields(open_model(config.components).path / "vae", "config.json")
  return component_fields.read_vae(fields, where)


def _empty_prompt(config: ConfigDict) -> Float[np.ndarray, "l t"]:
  return Encoders(open_model(config.components), config).text([""])[0]


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
