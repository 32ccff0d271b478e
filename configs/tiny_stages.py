"""configs/tiny.py in four stages, as the published training, at small sizes.

python -m cogvideox_jax.train --config=configs/tiny_stages.py --workdir=runs/tiny_stages

The clips are rendered once, at the largest size. The score of a clip is its contrast, and the last
stage trains on the fifth with the highest scores.
"""

from ml_collections import ConfigDict

from configs import base, tiny


def get_config() -> ConfigDict:
  config = tiny.get_config()
  third = {
    "sizes": ((32, 32), (32, 48), (48, 32)),
    "durations": (1, 9, 17, 25),
    "row_tokens": 400,
    "max_clips": 8,
    "rows_at_once": 0,
  }
  with config.unlocked():
    config.stages = ConfigDict()
    config.stages.stage1 = base.stage(
      sizes=((16, 16), (16, 24), (24, 16)),
      durations=(1, 9, 17),
      rows=16,
      row_tokens=104,
      max_clips=4,
      rows_at_once=0,
      share=4,
    )
    config.stages.stage2 = base.stage(
      sizes=((24, 24), (24, 40), (40, 24)),
      durations=(1, 9, 17),
      rows=8,
      row_tokens=200,
      max_clips=5,
      rows_at_once=0,
      share=2,
    )
    config.stages.stage3 = base.stage(**third, rows=8, share=1, learning_rate=2e-3)
    config.stages.stage4 = base.stage(
      **third, rows=8, share=1, learning_rate=5e-4, data="stage3", best=0.2
    )
  return config.lock()
