"""Makes a pipeline, or a model to convert, from the workdir of a training."""

from typing import NamedTuple

from etils import epath

from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.conversion import model_layouts, orbax, tensors
from cogvideox_jax.conversion.component_fields import write_noise
from cogvideox_jax.conversion.components import TRANSFORMER
from cogvideox_jax.conversion.folder import Settings, index_fields, open_model
from cogvideox_jax.conversion.model_contents import Model, Network
from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.inference.pipeline import Pipeline
from cogvideox_jax.inference.progress import Progress
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.t5 import T5Config
from cogvideox_jax.models.vae_config import VAEConfig
from cogvideox_jax.training import stages
from cogvideox_jax.training.checkpoint import open_weights
from cogvideox_jax.training.resume import read_config
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
  workdir = epath.Path(model)
  if not is_workdir(workdir):
    return kind.from_pretrained(model, progress=progress, offload=offload)
  config = read_config(workdir)
  _, found = _transformer(config, workdir, weights)
  return with_transformer(config, found, load_frozen(config), progress, kind, offload)


def is_workdir(path: epath.Path) -> bool:
  """Returns whether a folder is the workdir of a training that has saved something."""
  return (path / "checkpoints").is_dir()


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
  config = read_config(workdir)
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
