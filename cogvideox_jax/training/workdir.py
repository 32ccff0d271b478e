"""From a training workdir to a pipeline that samples with what it has learnt."""

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
  """The pipeline of a shipped name, a model folder, or a training workdir.

  Args:
    kind: Pipeline, ImageToVideo or VideoToVideo.
    weights: of a workdir's newest good checkpoint: `ema`, the moving average, or `raw`.
    progress, offload: as of `Pipeline`.

  Raises:
    UserError: there is no such model, or a part of it is missing or damaged.
  """
  workdir = epath.Path(model)
  if not is_workdir(workdir):
    return kind.from_pretrained(model, progress=progress, offload=offload)
  config = read_config(workdir)
  transformer = _transformer(config, workdir, weights)
  return with_transformer(config, transformer, load_frozen(config), progress, kind, offload)


def is_workdir(path: epath.Path) -> bool:
  return (path / "checkpoints").is_dir()


def _transformer(
  config: TrainConfig, workdir: epath.Path, weights: str
) -> tuple[DiTConfig, Params]:
  """The newest good one, lazy, with the positions of the stage that it was trained in."""
  found = open_weights(workdir, weights)
  stage = stages.trained_last(stages.plan(config), found.step)
  model = stages.stage_model(config, stage.name)
  with orbax.naming_writer(workdir / "checkpoints" / str(found.step)):
    shapes = TRANSFORMER.shapes(model)
    tensors.check_params(tensors.flatten(found.params), tensors.flatten(shapes))
  return model, found.params


def model(workdir: epath.Path, weights: str) -> Model:
  """What `convert` writes of a workdir: its transformer, and the rest that its config names.

  Raises:
    UserError: it has no good checkpoint, or a part is missing or damaged.
  """
  config = read_config(workdir)
  written = model_layouts.read_folder(open_model(config.components).path)
  transformer = _transformer(config, workdir, weights)
  written.networks["transformer"] = Network("transformer", *transformer, None)
  written.scheduler = write_noise(config.noise)
  takes_image = written.networks["transformer"].config.takes_image
  written.index = index_fields(_settings(config), takes_image)
  base = written.origin.name
  written.origin = written.origin._replace(
    name=workdir.name, note=f" A training run ({weights} weights); other parts from `{base}`."
  )
  return written


class Frozen(NamedTuple):
  """The networks that the transformer's training leaves as they are."""

  vae: tuple[VAEConfig, Params]
  text_encoder: tuple[T5Config, Params]
  tokenizer: Tokenizer


def load_frozen(config: TrainConfig) -> Frozen:
  """Those of a training config; a UserError if one is missing or damaged."""
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
  """The pipeline of a training config's frozen networks and a transformer."""
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
  """How a model that was trained so is best sampled: as its previews are."""
  return Settings(
    text_drop=config.text.drop,
    guidance_scale=config.preview.guidance_scale,
    num_inference_steps=config.preview.steps,
    solver=config.preview.solver,
    fps=config.data.fps,
    **({"image_scale": config.image.scale} if config.model.takes_image else {}),
  )
