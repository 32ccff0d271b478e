"""A model folder: diffusers' layout, with what a sampler needs to know beside it.

MODEL/model_index.json names the parts; transformer/, vae/, text_encoder/, tokenizer/ and scheduler/
hold them. A folder may lack parts, until one is asked for. The weights of a part are safetensors,
or Orbax arrays.
"""

import dataclasses
from typing import Any, NamedTuple

from etils import epath

from cogvideox_jax.conversion import component_fields, diffusers, orbax, tensors
from cogvideox_jax.conversion.components import COMPONENTS
from cogvideox_jax.conversion.tensors import Params
from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.diffusion.noise import NoiseConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.t5 import T5Config
from cogvideox_jax.models.vae_config import IMAGE_SCALES, VAEConfig

SHIPPED = ("tiny",)  # Models in the package's assets.
INDEX = "model_index.json"
SETTINGS = "cogvideox_jax"  # Our key in the index; diffusers passes over it.
TEXT_DROPS = ("zeros", "empty")
PARTS = {  # Library and class of each, as diffusers' index has them.
  "scheduler": ("diffusers", "CogVideoXDDIMScheduler"),
  "text_encoder": ("transformers", "T5EncoderModel"),
  "tokenizer": ("transformers", "T5Tokenizer"),
  "transformer": ("diffusers", "CogVideoXTransformer3DModel"),
  "vae": ("diffusers", "AutoencoderKLCogVideoX"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a model is best sampled; the defaults are what a folder of diffusers' means."""

  text_drop: str = "empty"  # What stands for no caption: the encoded "" or zeros.
  guidance_scale: float = 6.0
  num_inference_steps: int = 50
  solver: str = "ddim"  # One of solvers.SOLVERS.
  fps: float = 8.0
  image_scale: str = "diffusers"  # Of an image's latents, in image to video; IMAGE_SCALES.


class ModelFolder(NamedTuple):
  """Loads the parts of a model folder, each when asked for.

  Every method raises UserError, naming the file, when its part is missing or damaged.
  """

  path: epath.Path

  def settings(self) -> Settings:
    """Of the index; those of diffusers where a folder does not say."""
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
    """That of the scheduler's class, as diffusers' pipelines take it."""
    part = self.path / "scheduler"
    if not part.is_dir():
      return Settings.solver
    fields, _ = diffusers.read_fields(part, "scheduler_config.json")
    return "dpm" if fields.get("_class_name") == "CogVideoXDPMScheduler" else "ddim"

  def open(self, name: str) -> tuple[Any, Params]:
    """Config and lazy parameters of a network (of COMPONENTS)."""
    return open_network(name, self._part(name))

  def transformer(self) -> tuple[DiTConfig, Params]:
    return self._load("transformer")

  def vae(self) -> tuple[VAEConfig, Params]:
    return self._load("vae")

  def text_encoder(self) -> tuple[T5Config, Params]:
    return self._load("text_encoder")

  def _load(self, name: str) -> tuple[Any, Params]:
    config, params = self.open(name)
    return config, tensors.materialize(params)

  def has(self, part: str) -> bool:
    """Whether the index says that the model has this part: some are given text states."""
    fields, _ = diffusers.read_fields(self.path, INDEX)
    return fields.get(part) != [None, None]

  def tokenizer(self) -> Tokenizer:
    return diffusers.load_tokenizer(self._part("tokenizer"))

  def scheduler(self) -> NoiseConfig:
    return diffusers.load_scheduler(self._part("scheduler"))

  def _part(self, name: str) -> epath.Path:
    part = self.path / name
    if not part.is_dir():
      raise UserError(
        f"The model {self.path} has no {name}/.\nA model folder needs {', '.join(PARTS)}: fetch or "
        "write it again, or name another one."
      )
    return part


def open_network(name: str, folder: epath.Path) -> tuple[Any, Params]:
  """Config and lazy parameters of the network of that name (of COMPONENTS) in its folder."""
  component = COMPONENTS[name]
  config = component.read_config(*diffusers.read_fields(folder, diffusers.CONFIG))
  library = orbax if orbax.is_in(folder) else diffusers
  return config, library.open_weights(component, folder, config)


def open_model(name: epath.PathLike) -> ModelFolder:
  """The model of a shipped name or a path."""
  return ModelFolder(resolve(name))


def resolve(name: epath.PathLike) -> epath.Path:
  """The folder of a shipped name, or the path itself.

  Raises:
    UserError: there is no such folder.
  """
  if name in SHIPPED:
    return epath.resource_path("cogvideox_jax") / "assets" / name
  path = epath.Path(name)
  if not path.is_dir():
    raise UserError(
      f"There is no model at {name}.\nGive a shipped name ({', '.join(SHIPPED)}) or a folder in "
      "diffusers' layout. Nothing is downloaded for you; a published model is fetched with\n"
      "  hf download zai-org/CogVideoX-2b --local-dir CogVideoX-2b"
    )
  return path


def index_fields(settings: Settings, takes_image: bool = False) -> dict[str, Any]:
  """What model_index.json says of a whole model."""
  return {
    "_class_name": "CogVideoXImageToVideoPipeline" if takes_image else "CogVideoXPipeline",
    "_diffusers_version": component_fields.VERSION,
    **{part: list(where) for part, where in PARTS.items()},
    SETTINGS: dataclasses.asdict(settings),
  }


def write_index(folder: epath.PathLike, settings: Settings):
  """Writes model_index.json, last of all parts: a folder that has it is whole."""
  diffusers.write_fields(folder, INDEX, index_fields(settings))
