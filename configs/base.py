"""The default value of every key of the transformer's training.

`python -m cogvideox_jax.train --config=configs/base.py --help_config` prints what each key means,
its range and where its value comes from; cogvideox_jax/config/schema.py holds these texts. The
other configs say only what differs from this one.

"P" is the paper (arXiv:2408.06072), with its table or section.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """The published training in four stages, of a model of the 2B's size."""
  config = ConfigDict()
  config.seed = 0
  config.components = ""
  config.init_from = ""
  config.init = ConfigDict({"keep": ""})
  config.dtype = "auto"
  config.remat = "branches"
  config.model = _model()
  config.noise = _noise()
  config.text = ConfigDict({"drop": "zeros", "drop_rate": 0.1})
  config.image = _image()
  config.data = _data()
  config.stages = _stages()
  config.train = _train()
  config.optimizer = _optimizer()
  config.mesh = ConfigDict({"data": 1, "fsdp": -1, "context": 0, "tensor": 1})
  config.sharding = "fsdp"
  config.cpu_devices = 1
  config.log_every = 10
  config.checkpoint = ConfigDict({"every": 1000, "keep": 3})
  config.guard = ConfigDict({"in_a_row": 5, "spike": 20.0})
  config.watchdog = ConfigDict({"seconds": 1800.0})
  config.validation = ConfigDict({"every": 1000, "batches": 4})
  config.preview = _preview()
  return config.lock()


def _model() -> ConfigDict:
  model = ConfigDict()
  model.depth = 30
  model.heads = 30
  model.head_dim = 64
  model.time_width = 512
  model.in_channels = 16
  model.out_channels = 16
  model.patch = (1, 2, 2)
  model.text_width = 4096
  model.text_length = 226
  model.positions = "sincos"
  model.sample_frames = 49
  model.sample_height = 60
  model.sample_width = 90
  model.spatial_interpolation = 1.875
  model.temporal_interpolation = 1.0
  model.learned_positions = False
  model.ofs_width = 0
  return model


def _noise() -> ConfigDict:
  noise = ConfigDict()
  noise.steps = 1000
  noise.beta_start = 0.00085
  noise.beta_end = 0.012
  noise.snr_shift = 3.0
  noise.zero_terminal_snr = True
  return noise


def _image() -> ConfigDict:
  image = ConfigDict()
  image.draws = 4
  image.log_sigma_mean = -3.0
  image.log_sigma_std = 0.5
  image.drop_rate = 0.05
  image.scale = "scaled"
  return image


def _data() -> ConfigDict:
  data = ConfigDict()
  data.path = ""
  data.mixture = ConfigDict()  # Filled by `source`.
  data.clips = 0
  data.fps = 8.0
  data.validation_fraction = 0.01
  data.limits = ConfigDict()
  data.limits.max_pixels = 36_000_000
  data.limits.max_picture_pixels = 256_000_000
  data.limits.max_frames = 0
  data.limits.max_seconds = 86_400.0
  data.limits.max_bytes = 0
  data.limits.max_fps = 1000.0
  return data


def _stages() -> ConfigDict:
  # P Table 5 gives each stage's largest size, its seconds, row_tokens (25k, 75k, 700k, 700k), share
  # and a batch of 2000, 1000, 250 and 100 clips (our reading). The rows are ours: such a batch
  # needs 408, 235, 30 and 12 rows if all clips have full length, and 130, 70, 7 and 3 rows if half
  # of them are images. The other sizes, the learning rates and the context are ours as well.
  stages = ConfigDict()
  stages.stage1 = stage(
    sizes=sizes(256),
    durations=(1, 9, 17, 33, 49),
    rows=256,
    row_tokens=25_600,
    max_clips=32,
    share=400_000,
  )
  stages.stage2 = stage(
    sizes=sizes(480),
    durations=(1, 9, 17, 33, 49),
    rows=128,
    row_tokens=75_776,
    max_clips=32,
    share=220_000,
  )
  third = {
    "sizes": sizes(768),
    "durations": (1, 9, 17, 33, 49, 81),
    "row_tokens": 716_800,
    "max_clips": 64,
    "context": 16,
  }
  stages.stage3 = stage(**third, rows=16, share=120_000, learning_rate=5e-5)
  stages.stage4 = stage(  # P 3.1: the best fifth of the same clips.
    **third, rows=8, share=10_000, learning_rate=1e-5, data="stage3", best=0.2
  )
  return stages


def _train() -> ConfigDict:
  train = ConfigDict()
  train.steps = 750_000
  train.carry_optimizer = True
  train.growth = "extrapolate"
  train.explicit_uniform = True
  train.weighting = "clips"
  return train


def _optimizer() -> ConfigDict:
  optimizer = ConfigDict()
  optimizer.learning_rate = 1e-4
  optimizer.warmup_steps = 1000.0
  optimizer.final_fraction = 0.0
  optimizer.b1 = 0.9
  optimizer.b2 = 0.95
  optimizer.eps = 1e-8
  optimizer.weight_decay = 1e-4
  optimizer.clip_norm = 1.0
  optimizer.ema_decay = 0.9999
  return optimizer


def _preview() -> ConfigDict:
  preview = ConfigDict()
  preview.every = 1000
  preview.prompts = ()
  preview.images = ()
  preview.num_frames = 49
  preview.height = 256
  preview.width = 384
  preview.steps = 50
  preview.guidance_scale = 6.0
  preview.solver = "ddim"
  return preview


def source(path: str, weight: float) -> ConfigDict:
  """One dataset of config.data.mixture."""
  return ConfigDict({"path": path, "weight": float(weight)})


def sizes(short_side: int) -> tuple[tuple[int, int], ...]:
  """Buckets of one short side in pixels: (height, width) of four aspects, landscape and portrait.

  Several aspects, because the stages keep the aspect of the clips (P 3.1). Sides are multiples of
  16, the VAE's compression times the patch. P Table 5 prints one size for each stage: 256x384,
  480x720 and 768x1360.
  """
  longs = [round(short_side * aspect / 16) * 16 for aspect in (1, 4 / 3, 3 / 2, 16 / 9)]
  landscape = [(short_side, long) for long in longs]
  return (*landscape, *((long, short) for short, long in landscape[1:]))


def stage(
  *,
  sizes,
  durations,
  rows,
  row_tokens,
  max_clips,
  rows_at_once=1,
  context=1,
  share=1.0,
  learning_rate=0.0,
  data="",
  best=1.0,
) -> ConfigDict:
  """One stage of config.stages; cogvideox_jax.config.schema.StageConfig says what the keys mean."""
  return ConfigDict(
    {
      "sizes": sizes,
      "durations": durations,
      "rows": rows,
      "row_tokens": row_tokens,
      "max_clips": max_clips,
      "rows_at_once": rows_at_once,
      "context": context,
      "share": share,
      "learning_rate": learning_rate,
      "data": data,
      "best": best,
    }
  )
