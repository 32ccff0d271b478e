"""The networks of a model folder: the architecture, tensor names and config of each."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import nnx

from cogvideox_jax.conversion import component_fields, names, tensors
from cogvideox_jax.conversion.names import Row
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.t5 import T5Encoder
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.types import Params


class Component(NamedTuple):
  """A kind of network. `Config` below stands for its frozen dataclass."""

  model: Callable[..., nnx.Module]
  rows: Callable[[Any], tuple[Row, ...]]  # Config -> its table of names.
  read_config: Callable[
    [Mapping[str, Any], str], Any
  ]  # (config.json's fields, its path) -> Config.
  write_config: Callable[[Any], dict[str, Any]]  # Config -> config.json's fields.
  weights: str  # Name of its safetensors file, without the ending.
  aliases: Mapping[str, str] = {}  # Alternative names of tensors -> those of the table.

  def shapes(self, config: Any) -> Params:
    """The shapes and dtypes of the parameters; allocates nothing."""
    return tensors.abstract_params(self.model, config)

  def read(self, found: tensors.Tensors, config: Any) -> Params:
    """The lazy parameters that a file's tensors hold.

    Raises:
      UserError: the tensors are those of another model.
    """
    return tensors.read(found, self.rows(config), self.shapes(config))

  def as_file(self, params: Params, config: Any) -> tensors.AsFile:
    """The tensors that a file of these parameters holds.

    Raises:
      UserError: the parameters are those of another model.
    """
    return tensors.AsFile(params, self.rows(config), self.shapes(config))


TRANSFORMER = Component(
  DiT,
  names.transformer,
  component_fields.read_transformer,
  component_fields.write_transformer,
  weights="diffusion_pytorch_model",
)
AUTOENCODER = Component(
  VAE,
  names.vae,
  component_fields.read_vae,
  component_fields.write_vae,
  weights="diffusion_pytorch_model",
)
TEXT_ENCODER = Component(
  T5Encoder,
  names.text_encoder,
  component_fields.read_text_encoder,
  component_fields.write_text_encoder,
  weights="model",
  aliases={"encoder.embed_tokens.weight": "shared.weight"},  # T5 stores one embedding under two.
)
COMPONENTS = {"transformer": TRANSFORMER, "vae": AUTOENCODER, "text_encoder": TEXT_ENCODER}
