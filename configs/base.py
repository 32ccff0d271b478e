"""Every key of a training config, with the published values where there are any.

Sources: P is the paper (arXiv:2408.06072), its table or section; `ours` was not published.
A key that can be set on the command line is never None. Leaves say only what differs.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """CogVideoX's published training in four stages, of a model of the 2B's size."""
  config = ConfigDict()
  config.seed = 0
  config.components = ""  # Model folder, or shipped name, of VAE, text encoder and tokenizer.
  config.init_from = ""  # Model folder or workdir whose transformer to start from; "": none.
  config.dtype = "auto"  # Compute: bfloat16, float32; auto is float32 on CPU, else bfloat16.
  # What each layer's backward pass computes again of the forward one. none: nothing; full: all;
  # attention: all but attention; branches: neither that nor what the MLP adds; linear: no linear
  # layers either; offload: as attention, with what is kept for it in the host's memory.
  config.remat = "branches"

  config.model = ConfigDict()  # Fields of models.dit.DiTConfig.
  config.model.depth = 30
  config.model.heads = 30
  config.model.head_dim = 64
  config.model.time_width = 512
  config.model.in_channels = 16
  config.model.out_channels = 16
  config.model.patch = (1, 2, 2)  # Latent frames, height, width.
  config.model.text_width = 4096
  config.model.text_length = 226  # Tokens; T5's padding counts.
  config.model.positions = "sincos"  # sincos (2B), rope (5B), rope_index (1.5).
  config.model.sample_frames = 49  # Pixel frames, latent height and width that the published
  config.model.sample_height = 60  # position rules rescale to, and the pipelines' default size.
  config.model.sample_width = 90
  config.model.spatial_interpolation = 1.875  # Of sincos positions.
  config.model.temporal_interpolation = 1.0
  config.model.learned_positions = False  # Of 5B-I2V.
  config.model.ofs_width = 0  # 512 in 1.5-I2V.

  config.noise = ConfigDict()  # Fields of diffusion.noise.NoiseConfig.
  config.noise.steps = 1000
  config.noise.beta_start = 0.00085
  config.noise.beta_end = 0.012
  config.noise.snr_shift = 3.0  # 2B; the 5B models use 1.0 (SAT `shift_scale`).
  config.noise.zero_terminal_snr = True

  config.text = ConfigDict()
  config.text.drop = "zeros"  # What a dropped caption is: zeros (SAT) or empty (diffusers).
  config.text.drop_rate = 0.1  # SAT.

  config.image = ConfigDict()  # Of models that see an image: in_channels is twice out_channels.
  config.image.draws = 4  # Noised first frames that are encoded of a clip; epochs take turns. Ours.
  config.image.log_sigma_mean = -3.0  # Of the noise on pixels of [-1, 1], as is the next; SAT.
  config.image.log_sigma_std = 0.5
  config.image.drop_rate = (
    0.05  # SAT `noised_image_dropout`; its draw is of a batch, ours of a clip.
  )
  config.image.scale = "scaled"  # Of its latents: scaled (SAT's training), raw, diffusers.

  config.data = ConfigDict()
  config.data.path = ""  # An encoded dataset; "": the embedded clips, made in WORKDIR/data.
  config.data.mixture = ConfigDict()  # Instead of a path: name -> `source` of several datasets.
  config.data.clips = 0  # How many embedded clips to render when there is no path.
  config.data.fps = 8.0
  config.data.validation_fraction = 0.01  # Of the clips, chosen by their names; ours.

  # Name -> what that stage trains on, one after the other in the order of names. P Table 5: largest
  # size, seconds (at 8 frames a second), row_tokens (25k, 75k, 700k), share, and a batch of 2000,
  # 1000, 250 and 100 clips (our reading). Rows are ours: clips of full length would need 408, 235,
  # 30 and 12 for such a batch, a mix of which half are images 130, 70, 7 and 3. The other sizes and
  # the learning rates are ours, too.
  config.stages = ConfigDict()
  config.stages.stage1 = stage(
    sizes=sizes(256),
    durations=(1, 9, 17, 33, 49),
    rows=256,
    row_tokens=25_600,
    max_clips=32,
    share=400_000,
  )
  config.stages.stage2 = stage(
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
    "context": 16,  # Ours, as in all stages.
  }
  config.stages.stage3 = stage(**third, rows=16, share=120_000, learning_rate=5e-5)
  config.stages.stage4 = stage(  # P 3.1: the best fifth of the same clips.
    **third, rows=8, share=10_000, learning_rate=1e-5, data="stage3", best=0.2
  )

  config.train = ConfigDict()
  config.train.steps = 750_000  # Updates in all, over all stages. P Table 5.
  config.train.carry_optimizer = True  # To the next stage; else it begins with no moments. Ours.
  config.train.growth = "extrapolate"  # P 2.4. Of positions, from stage to stage; or interpolate.
  config.train.explicit_uniform = True  # P 2.5.

  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 1e-4  # Its peak, of stages that name no other; ours.
  config.optimizer.warmup_steps = 1000  # Of each stage; of several, a tenth of each at most. Ours.
  config.optimizer.final_fraction = 0.0  # Of the peak, where the cosine ends; ours.
  config.optimizer.b1 = 0.9  # P Table 6, as the next four.
  config.optimizer.b2 = 0.95
  config.optimizer.eps = 1e-8
  config.optimizer.weight_decay = 1e-4
  config.optimizer.clip_norm = 1.0
  config.optimizer.ema_decay = 0.9999  # ours

  # Devices along each axis, in each slice of the job; one may be -1: all that are left.
  config.mesh = ConfigDict()
  config.mesh.data = 1
  config.mesh.fsdp = -1
  config.mesh.context = 0  # Share a row's tokens; 0: as many as the stage's `context` says.
  config.mesh.tensor = 1
  config.sharding = "fsdp"  # A row of sharding.RULES.
  config.cpu_devices = 1  # How many devices a CPU counts as; they share its cores.

  config.log_every = 10  # Steps.
  config.checkpoint = ConfigDict({"every": 1000, "keep": 3})
  config.validation = ConfigDict({"every": 1000, "batches": 4})
  config.preview = ConfigDict()
  config.preview.every = 1000  # Steps; 0: never.
  config.preview.prompts = ()
  config.preview.images = ()  # Files, one for each prompt, of models that see an image.
  config.preview.num_frames = 49
  config.preview.height = 256
  config.preview.width = 384
  config.preview.steps = 50
  config.preview.guidance_scale = 6.0
  config.preview.solver = "ddim"
  return config.lock()


def source(path: str, weight: float) -> ConfigDict:
  """One dataset of config.data.mixture.

  path: as config.data.path, or the folder of one stage, of whatever name. weight: this dataset's
  share of the rows, and so of the tokens, times any number; 0 is none. Weights may change when a
  run is started again, and datasets be added and left out: each goes on where it was left. A row
  holds clips of one dataset, so one of small images alone fills rows only if max_clips allows it.
  """
  return ConfigDict({"path": path, "weight": float(weight)})


def sizes(short_side: int) -> tuple[tuple[int, int], ...]:
  """(height, width) from square to wide, lying and standing, since stages keep the aspect (P 3.1).

  Sides are multiples of 16: the VAE's compression times the patch. Table 5 prints one size a stage:
  256x384, 480x720 and 768x1360.
  """
  longs = [round(short_side * aspect / 16) * 16 for aspect in (1, 4 / 3, 3 / 2, 16 / 9)]
  lying = [(short_side, long) for long in longs]
  return (*lying, *((long, short) for short, long in lying[1:]))


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
  """What one stage trains on.

  sizes: (height, width) buckets in pixels. durations: pixel frames, each 4k+1.
  rows: packed rows in the global batch, each of row_tokens tokens (text and vision) and at most
  max_clips clips. rows_at_once: that a device computes with; the gradients of the others of its
  rows are added in turn. 0: all of them. context: the most devices that share a row; the mesh takes
  the largest number that divides what its other axes leave, where config.mesh.context is 0.
  share: of config.train.steps, times any number; each stage has one step at least.
  learning_rate: its peak; 0 is that of config.optimizer. Each stage has a warm-up and a cosine of
  its own.
  data: the stage whose encoded clips it reads; "" is its own. best: the fraction of the clips that
  it trains on, those of the highest scores (the manifest's `score`), of each dataset.
  """
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
