"""Reads and writes model folders: diffusers' layout, with our settings for sampling in the index.

MODEL/model_index.json names the components; transformer/, vae/, text_encoder/, tokenizer/ and
scheduler/ hold them. A missing component is an error only when it is asked for. Weights are
safetensors or Orbax arrays.
"""

import dataclasses
from typing import Any, NamedTuple

from etils import epath

from cogvideox_jax import paths
from cogvideox_jax.conversion import component_fields, diffusers, orbax, tensors
from cogvideox_jax.conversion.components import COMPONENTS
from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.diffusion.noise import NoiseConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.t5 import T5Config
from cogvideox_jax.models.vae_config import IMAGE_SCALES, VAEConfig
from cogvideox_jax.types import Params

SHIPPED = ("tiny",)  # Models in the package's assets.
INDEX = "model_index.json"
SETTINGS = "cogvideox_jax"  # Our key in the index; diffusers ignores it.
TEXT_DROPS = ("zeros", "empty")
CLASSES = {  # Component -> its library and class, as diffusers' index names them.
  "scheduler": ("diffusers", "CogVideoXDDIMScheduler"),
  "text_encoder": ("transformers", "T5EncoderModel"),
  "tokenizer": ("transformers", "T5Tokenizer"),
  "transformer": ("diffusers", "CogVideoXTransformer3DModel"),
  "vae": ("diffusers", "AutoencoderKLCogVideoX"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """The best settings for sampling a model; the defaults hold for folders without our key."""

  text_drop: str = "empty"  # Text states without a caption: `empty` is the encoded "", or `zeros`.
  guidance_scale: float = 6.0
  num_inference_steps: int = 50
  solver: str = "ddim"  # One of solvers.SOLVERS.
  fps: float = 8.0
  image_scale: str = "diffusers"  # One of vae_config.IMAGE_SCALES: scales an image's latents.


class ModelFolder(NamedTuple):
  """Loads components of a model folder on request.

  Every method raises a UserError that names the file if the component is missing or damaged.
  """

  path: epath.Path

  def settings(self) -> Settings:
    """The settings in the index; a missing one is as in diffusers."""
    fields, where = diffusers.read_fields(self.path, INDEX)
    stored = {"solver": self._solver(), **fields.get(SETTINGS, {})}
    known = {field.name for field in dataclasses.fields(Settings)}
    if unknown := sorted(set(stored) - known):
      raise UserError(f"{where}: {SETTINGS} has {', '.join(unknown)}; known are {sorted(known)}.")
    settings = Settings(**stored)
    for name, choices in (("text_drop", TEXT_DROPS), ("image_scale", IMAGE_SCALES)):
      if (value := getattr(settings, name)) not in choices:
        raise UserError(f"{where}: {name} is {value!r}, not one of {choices}.")
    return settings

  def _solver(self) -> str:
    """The solver of the scheduler's class, which diffusers' pipelines use."""
    folder = self.path / "scheduler"
    if not folder.is_dir():
      return Settings.solver
    fields, _ = diffusers.read_fields(folder, diffusers.SCHEDULER_CONFIG)
    return "dpm" if fields.get("_class_name") == "CogVideoXDPMScheduler" else "ddim"

  def open(self, name: str) -> tuple[Any, Params]:
    """Config and lazy parameters of a network, one of COMPONENTS."""
    return open_network(name, self._component(name))

  def transformer(self) -> tuple[DiTConfig, Params]:
    return self._load("transformer")

  def vae(self) -> tuple[VAEConfig, Params]:
    return self._load("vae")

  def text_encoder(self) -> tuple[T5Config, Params]:
    return self._load("text_encoder")

  def _load(self, name: str) -> tuple[Any, Params]:
    config, params = self.open(name)
    return config, tensors.materialize(params)

  def has(self, component: str) -> bool:
    """Whether the index says that the model has a component.

    A model whose prompts are given as text states may lack text encoder and tokenizer.
    """
    fields, _ = diffusers.read_fields(self.path, INDEX)
    return fields.get(component) != [None, None]

  def tokenizer(self) -> Tokenizer:
    return diffusers.load_tokenizer(self._component("tokenizer"))

  def scheduler(self) -> NoiseConfig:
    return diffusers.load_scheduler(self._component("scheduler"))

  def _component(self, name: str) -> epath.Path:
    """The folder of a component."""
    folder = self.path / name
    check_average(self.path, name)
    if not folder.is_dir():
      raise UserError(
        f"The model {self.path} has no {name}/.\nA model folder needs {', '.join(CLASSES)}: fetch "
        "or write it again, or name another one."
      )
    return folder


def check_average(path: epath.Path, name: str) -> None:
  """Raises UserError if a model folder has a component's moving average alone."""
  average = path / f"{name}_ema"
  if average.is_dir() and not (path / name).is_dir():
    raise UserError(
      f"{path} has {average.name}/, the moving average of a training, and no {name}/.\n"
      f"Copy or rename it to {name}/ to use it."
    )


def open_network(name: str, folder: epath.Path) -> tuple[Any, Params]:
  """Config and lazy parameters of a network in its folder.

  name: one of COMPONENTS.

  Raises:
    UserError: the config or the weights are missing, damaged or not supported. If Orbax arrays do
      not fit, the error names the version that wrote them.
  """
  component = COMPONENTS[name]
  with orbax.naming_writer(folder / orbax.FOLDER):
    config = component.read_config(*diffusers.read_fields(folder, diffusers.CONFIG))
  library = orbax if orbax.is_in(folder) else diffusers
  return config, library.open_weights(component, folder, config)


def open_model(name: epath.PathLike) -> ModelFolder:
  """The model of a shipped name or in a folder."""
  return ModelFolder(resolve(name))


def resolve(name: epath.PathLike) -> epath.Path:
  """The folder of a shipped name, or the path itself.

  Raises:
    UserError: there is no such folder.
  """
  if name in SHIPPED:
    return epath.resource_path("cogvideox_jax") / "assets" / name
  path = epath.Path(paths.absolute(name))
  if not path.is_dir():
    raise UserError(
      f"There is no model at {name}.\nGive a shipped name ({', '.join(SHIPPED)}) or a folder in "
      "diffusers' layout. Nothing is downloaded for you; a published model is fetched with\n"
      "  hf download zai-org/CogVideoX-2b --local-dir CogVideoX-2b"
    )
  return path


def index_fields(settings: Settings, takes_image: bool = False) -> dict[str, Any]:
  """The fields of model_index.json for a model that has all components."""
  return {
    "_class_name": "CogVideoXImageToVideoPipeline" if takes_image else "CogVideoXPipeline",
    "_diffusers_version": component_fields.VERSION,
    **{component: list(where) for component, where in CLASSES.items()},
    "scheduler": ["diffusers", component_fields.SCHEDULERS[settings.solver]],
    SETTINGS: dataclasses.asdict(settings),
  }


def write_index(folder: epath.PathLike, settings: Settings):
  """Writes model_index.json. Call it last: a folder that has the file is complete."""
  diffusers.write_fields(folder, INDEX, index_fields(settings))
