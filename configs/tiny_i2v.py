"""configs/tiny.py for a model that sees an image: image to video at a small size.

python -m cogvideox_jax.train --config=configs/tiny_i2v.py --workdir=runs/tiny_i2v
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  config = tiny.get_config()
  config.model.in_channels = 32  # Noised latents, then those of the image.
  config.stages.tiny.durations = (9, 17)  # A clip of one frame would show its own image.
  config.preview.every = 0  # It needs config.preview.images.
  return config.lock()
