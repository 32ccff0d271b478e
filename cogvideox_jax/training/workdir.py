"""Makes a pipeline, or a model to convert, from the workdir of a training."""

from typing import NamedTuple

from etils import epath

from cogvideox_jax import paths
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.conversion import model_layouts, orbax, tensors
from cogvideox_jax.conversion.component_fields import write_noise
from cogvideox_jax.conversion.components import TRANSFORMER
from cogvideox_jax.conversion.folder import Settings, index_fields, open_model
from cogvideox_jax.conversion.model_contents import Model, Network
from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.diffusion.noise import noise_schedule
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference.pipeline import Pipeline
from cogvideox_jax.inference.progress import Progress
from cogvideox_jax.inference.request import SampledModel
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.t5 import T5Config
from cogvideox_jax.models.vae_config import VAEConfig
from cogvideox_jax.training import stages
from cogvideox_jax.training.checkpoint import open_weights
from cogvideox_jax.training.metrics import EVENTS
from cogvideox_jax.training.resume import CONFIG_FILE, older_line, read_config
from cogvideox_jax.training.session import say
from cogvideox_jax.types import Params


def load(
  model: epath.PathLike,
  *,
  kind: type[Pipeline] = Pipeline,
  weights: str = "ema",
  progress: Progress | None = None,
  offload: bool = False,
) -> Pipeline:
  """Returns the pipeline of a shipped name, a model folder, or a training workdir.

  Args:
    kind: Pipeline, ImageToVideo or VideoToVideo.
    weights: which weights of a workdir's newest good checkpoint: `ema`, the moving average, or
      `raw`, the weights as trained.
    progress: as in `Pipeline`.
    offload: as in `Pipeline`.

  Raises:
    UserError: there is no such model, or a component of it is missing or damaged.
  """
  workdir = epath.Path(paths.absolute(model))
  if not is_workdir(workdir):
    return kind.from_pretrained(model, progress=progress, offload=offload)
  config = _read_config(workdir)
  _say_if_older(workdir)
  _, found = _transformer(config, workdir, weights)
  return with_transformer(config, found, load_frozen(config), progress, kind, offload)


def describe(model: epath.PathLike) -> SampledModel:
  """Returns what the arguments of a call are checked against; no weights are read.

  Args:
    model: as for `load`.

  Raises:
    UserError: there is no such model, or a component of it is missing or damaged.
  """
  workdir = epath.Path(paths.absolute(model))
  if not is_workdir(workdir):
    folder = open_model(model)
    noise, settings = folder.scheduler(), folder.settings()
    return SampledModel(
      folder.open("transformer")[0], folder.open("vae")[0], noise_schedule(noise), settings
    )
  config = _read_config(workdir)
  return SampledModel(
    _transformer(config, workdir, "ema")[1][0],
    open_model(config.components).open("vae")[0],
    noise_schedule(config.noise),
    _settings(config),
  )


def is_workdir(path: epath.Path) -> bool:
  """Returns whether a folder is the workdir of a training, even if that has saved nothing yet."""
  return (path / "checkpoints").is_dir() or (path / EVENTS).exists()


def _read_config(workdir: epath.Path) -> TrainConfig:
  """Returns a workdir's config; a UserError if its components are not where it says."""
  config = read_config(workdir)
  try:
    open_model(config.components)
  except UserError as error:
    raise UserError(
      f"The components of {workdir} are not where its {CONFIG_FILE} says. If they moved, change "
      f"`components` there.\n{error}"
    ) from error
  return config


def _say_if_older(workdir: epath.Path) -> None:
  if line := older_line(workdir):
    say(line)


def _transformer(
  config: TrainConfig, workdir: epath.Path, weights: str
) -> tuple[stages.Stage, tuple[DiTConfig, Params]]:
  """Returns the stage of the newest good checkpoint, and its transformer with the positions of it.

  Its arrays are read when they are used.
  """
  found = open_weights(workdir, weights)
  stage = stages.trained_last(stages.plan(config), found.step)
  model = stages.stage_model(config, stage.name)
  with orbax.naming_writer(workdir / "checkpoints" / str(found.step)):
    shapes = TRANSFORMER.shapes(model)
    tensors.check_params(tensors.flatten(found.params), tensors.flatten(shapes))
  return stage, (model, found.params)


def open_trained(workdir: epath.Path, weights: str) -> Model:
  """Returns the model that `convert` writes: a workdir's transformer with its other components.

  The other components are those that the workdir's config names.

  Raises:
    UserError: it has no good checkpoint, or a component is missing or damaged.
  """
  config = _read_config(workdir)
  _say_if_older(workdir)
  trained = model_layouts.read_folder(open_model(config.components).path)
  stage, (model, params) = _transformer(config, workdir, weights)
  trained.networks["transformer"] = Network("transformer", model, params, None)
  trained.trained_sizes = tuple(config.stages[stage.name].sizes)
  trained.scheduler = write_noise(config.noise, config.preview.solver)
  trained.index = index_fields(_settings(config), model.takes_image)
  base = trained.origin.name
  trained.origin = trained.origin._replace(
    name=workdir.name, note=f" A training run ({weights} weights); other parts from `{base}`."
  )
  return trained


class Frozen(NamedTuple):
  """The networks that the transformer's training does not change."""

  vae: tuple[VAEConfig, Params]
  text_encoder: tuple[T5Config, Params]
  tokenizer: Tokenizer


def load_frozen(config: TrainConfig) -> Frozen:
  """Loads the frozen networks of a config; a UserError if one is missing or damaged."""
  components = open_model(config.components)
  return Frozen(components.vae(), components.text_encoder(), components.tokenizer())


def with_transformer(
  config: TrainConfig,
  transformer: tuple[DiTConfig, Params],
  frozen: Frozen,
  progress: Progress | None = None,
  kind: type[Pipeline] = Pipeline,
  offload: bool = False,
) -> Pipeline:
  """Returns the pipeline of a transformer and of a training config's frozen networks."""
  return kind(
    transformer,
    *frozen,
    config.noise,
    _settings(config),
    dtype=config.dtype,
    progress=progress,
    offload=offload,
  )


def _settings(config: TrainConfig) -> Settings:
  """Returns how a trained model is sampled by default: as its previews are."""
  return Settings(
    text_drop=config.text.drop,
    guidance_scale=config.preview.guidance_scale,
    num_inference_steps=config.preview.steps,
    solver=config.preview.solver,
    fps=config.data.fps,
    **({"image_scale": config.image.scale} if config.model.takes_image else {}),
  )
