"""From a training workdir to a pipeline that samples with what it has learnt."""

import json

from etils import epath
from ml_collections import ConfigDict

from cogvideox_jax.conversion.folder import Settings, open_model
from cogvideox_jax.diffusion.noise import NoiseConfig
from cogvideox_jax.inference.pipeline import Pipeline
from cogvideox_jax.inference.progress import Progress
from cogvideox_jax.models.dit import DiTConfig
from cogvideox_jax.training.checkpoint import load_weights
from cogvideox_jax.training.resume import NAME
from cogvideox_jax.training.state import Params


def load(
  model: epath.PathLike, *, weights: str = "ema", progress: Progress | None = None
) -> Pipeline:
  """The pipeline of a shipped name, a model folder, or a training workdir.

  Args:
    weights: of a workdir's newest good checkpoint: `ema`, the moving average, or `raw`.

  Raises:
    UserError: there is no such model, or a part of it is missing or damaged.
  """
  workdir = epath.Path(model)
  if not (workdir / "checkpoints").is_dir():
    return Pipeline.from_pretrained(model, progress=progress)
  config = ConfigDict(json.loads((workdir / NAME).read_text()))
  return with_transformer(config, load_weights(workdir, weights), progress=progress)


def with_transformer(
  config: ConfigDict, params: Params, *, progress: Progress | None = None
) -> Pipeline:
  """The pipeline of a training config's frozen networks and the transformer's `params`."""
  components = open_model(config.components)
  transformer = DiTConfig(**{**config.model, "patch": tuple(config.model.patch)})
  settings = Settings(
    text_drop=config.text.drop,
    guidance_scale=config.preview.guidance_scale,
    num_inference_steps=config.preview.steps,
    fps=config.data.fps,
  )
  return Pipeline(
    (transformer, params),
    components.vae(),
    components.text_encoder(),
    components.tokenizer(),
    NoiseConfig(**config.noise),
    settings,
    dtype=config.dtype,
    progress=progress,
  )
