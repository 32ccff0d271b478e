"""The published stages of training, for `encode`: one dataset each, of 256, 512 and 768 pixels.

python -m cogvideox_jax.encode --config=configs/stages.py --input=CLIPS --output=DIR --model=MODEL

The numbers are the short side. Training takes a config with one of the stages.
Source: P the paper, Table 5 and section 3.1 (the short side; the aspect is kept).
"""

from ml_collections import ConfigDict

from configs import base

# Long side over short side, from square to wide; each lies and stands. Ours.
ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9)
MULTIPLE = 16  # Of each side: the VAE's compression times the patch.


def get_config() -> ConfigDict:
  config = base.get_config()
  six_seconds = (1, 9, 17, 33, 49)
  with config.unlocked():
    config.stages = ConfigDict()
    config.stages.stage1 = base.stage(
      sizes=sizes(256), durations=six_seconds, rows=256, row_tokens=25_600, max_clips=32
    )
    config.stages.stage2 = base.stage(
      sizes=sizes(512), durations=six_seconds, rows=128, row_tokens=75_776, max_clips=32
    )
    config.stages.stage3 = base.stage(  # P: ten seconds.
      sizes=sizes(768), durations=(*six_seconds, 81), rows=32, row_tokens=716_800, max_clips=64
    )
  return config.lock()


def sizes(short_side: int) -> tuple[tuple[int, int], ...]:
  """(height, width) of every aspect, the long side rounded to the multiple."""
  longs = [round(short_side * aspect / MULTIPLE) * MULTIPLE for aspect in ASPECTS]
  lying = [(short_side, long) for long in longs]
  return (*lying, *((long, short) for short, long in lying[1:]))
