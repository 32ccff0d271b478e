"""configs/tiny.py for image to video: the model sees the first frame.

python -m cogvideox_jax.train --config=configs/tiny_i2v.py --workdir=runs/tiny_i2v
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  config = tiny.get_config()
  config.model.in_channels = 32  # The noised latents, then the image's latents.
  config.stages.tiny.durations = (9, 17)  # A clip of one frame would be its own first frame.
  config.preview.every = 0  # Previews need config.preview.images.
  return config.lock()
