"""Puts the shipped tiny model together, as the package's assets hold it.

python launch/make_tiny.py --vae=runs/vae_tiny/vae                    text encoder, tokenizer, VAE
python launch/make_tiny.py --vae=... --transformer=runs/tiny_long     and the transformer

The text encoder is T5's architecture with frozen random weights: the transformer learns what its
states mean. Only the relative biases are drawn larger than T5 starts them, so that heads look at
single neighbours; with T5's own, every head averages the whole prompt, and "a red circle on a blue
background" has the states of "a blue circle on a red background" in another order.
"""

import jax
import ml_dtypes
import numpy as np
from absl import app, flags
from etils import epath
from flax import nnx

from cogvideox_jax.conversion import diffusers
from cogvideox_jax.conversion.folder import Settings, write_index
from cogvideox_jax.models.t5 import T5Config, T5Encoder
from cogvideox_jax.training import checkpoint, resume

TARGET = flags.DEFINE_string("target", "cogvideox_jax/assets/tiny", "The model folder.")
VAE = flags.DEFINE_string("vae", None, "What train_vae left: WORKDIR/vae.", required=True)
TRANSFORMER = flags.DEFINE_string("transformer", "", "Workdir of the long training.")
RELATIVE_BIAS_STD = 3.0
SETTINGS = Settings(
  text_drop="zeros", guidance_scale=4.0, num_inference_steps=50, solver="dpm", fps=8.0
)


def text_encoder() -> tuple[T5Config, dict]:
  config = T5Config(width=64, head_dim=8, heads=8, mlp_width=128, depth=3)
  params = nnx.to_pure_dict(nnx.state(T5Encoder(config, rngs=nnx.Rngs(0)), nnx.Param))
  bias = params["relative_bias"]["embedding"]
  params["relative_bias"]["embedding"] = RELATIVE_BIAS_STD * jax.random.normal(
    jax.random.key(1), bias.shape
  )
  return config, half(params)


def half(params: dict) -> dict:
  """As bfloat16, which is what the published models are stored in."""
  return jax.tree.map(lambda x: np.asarray(x, ml_dtypes.bfloat16), params)


def main(_) -> None:
  target = epath.Path(TARGET.value)
  diffusers.save_text_encoder(target / "text_encoder", *text_encoder())
  config, params = diffusers.load_vae(VAE.value)
  diffusers.save_vae(target / "vae", config, half(params))
  if TRANSFORMER.value:
    trained = resume.read_config(epath.Path(TRANSFORMER.value))
    weights = checkpoint.load_weights(TRANSFORMER.value)
    diffusers.save_transformer(target / "transformer", trained.model, half(weights))
    diffusers.save_scheduler(target / "scheduler", trained.noise, SETTINGS.solver)
  write_index(target, SETTINGS)


if __name__ == "__main__":
  app.run(main)
