"""A small model of every part. It trains on the embedded clips in minutes on two CPU cores.

python -m cogvideox_jax.train --config=configs/tiny.py --workdir=runs/tiny
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.components = "tiny"
  config.remat = "none"
  config.model.update(
    depth=6,
    heads=4,
    head_dim=32,
    time_width=64,
    text_width=64,
    text_length=20,
    positions="rope_index",
    sample_frames=17,
    sample_height=8,
    sample_width=8,
  )
  config.noise.snr_shift = 1.0
  config.data.clips = 2000
  config.data.validation_fraction = 0.02
  with config.unlocked():
    config.stages = ConfigDict()
    config.stages.tiny = base.stage(
      sizes=((32, 32), (24, 40), (40, 24)),
      durations=(1, 9, 17),
      rows=8,
      row_tokens=200,
      max_clips=5,
      rows_at_once=0,
    )
  config.train.steps = 1600
  config.optimizer.update(learning_rate=4e-3, warmup_steps=1 / 32, ema_decay=0.99)
  config.mesh.update(data=-1, fsdp=1)
  config.cpu_devices = 2
  config.checkpoint.every = 500
  config.validation.every = 500
  config.preview.update(
    every=500,
    prompts=(
      "a red circle moves right on a blue background",
      "a yellow square moves up on a black background",
    ),
    num_frames=17,
    height=32,
    width=32,
    steps=50,
    guidance_scale=4.0,
    solver="dpm",
  )
  return config.lock()
