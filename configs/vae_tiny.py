"""The tiny VAE, trained on the embedded clips: compresses 4x in space and in time.

python -m cogvideox_jax.train_vae --config=configs/vae_tiny.py --workdir=runs/vae_tiny

`train_vae --config=configs/vae_tiny.py --help_config` prints what each key means. All values are
ours, because the training of the published VAE was not released: section 2.1 of the paper names its
losses, but not their weights.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.init_from = ""

  config.model = ConfigDict()
  config.model.in_channels = 3
  config.model.channels = (16, 32, 64)
  config.model.latent_channels = 16
  config.model.resnets = 1
  config.model.groups = 8
  config.model.temporal_compression = 4

  config.data = ConfigDict()
  config.data.path = ""
  config.data.clips = 1200
  config.data.fps = 8.0
  config.data.more_fps = ()
  config.data.image_share = 0.0
  config.data.sizes = ((32, 32), (24, 40))
  config.data.durations = (1, 17)
  config.data.validation_fraction = 0.01
  config.data.limits = ConfigDict()
  config.data.limits.max_pixels = 36_000_000
  config.data.limits.max_picture_pixels = 256_000_000
  config.data.limits.max_frames = 0
  config.data.limits.max_seconds = 86_400.0
  config.data.limits.max_bytes = 0
  config.data.limits.max_fps = 1000.0
  config.data.subfolders = True
  config.data.allow_links = False

  config.train = ConfigDict()
  config.train.steps = 1500
  config.train.frames = 64
  config.train.batch_multiple = 1
  config.train.microbatches = 1
  config.train.remat = False
  config.stages = ConfigDict()

  config.loss = ConfigDict()
  config.loss.l1 = 0.1
  config.loss.l2 = 1.0
  config.loss.kl = 1e-4
  config.loss.perceptual = 0.0
  config.loss.perceptual_frames = 0
  config.loss.adversarial = 0.0
  config.loss.adaptive = False
  config.loss.gan_start = 0.5

  config.discriminator = ConfigDict()
  config.discriminator.model = ConfigDict()
  config.discriminator.model.channels = (16, 32, 32)
  config.discriminator.model.temporal_levels = 2
  config.discriminator.model.groups = 8
  config.discriminator.learning_rate = 1e-3
  config.discriminator.b1 = 0.5
  config.discriminator.b2 = 0.9
  config.discriminator.r1 = 0.0
  config.discriminator.frames = 0

  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 1 / 15
  config.optimizer.final_fraction = 0.01
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.eps = 1e-8
  config.optimizer.weight_decay = 1e-4
  config.optimizer.clip_norm = 1.0
  config.optimizer.ema_decay = 0.995

  config.mesh = ConfigDict({"data": 1, "fsdp": -1, "context": 0, "tensor": 1})
  config.sharding = "fsdp"
  config.cpu_devices = 1

  config.log_every = 20
  config.checkpoint = ConfigDict({"every": 500, "keep": 2})
  config.validation = ConfigDict({"every": 500, "batches": 8})
  config.preview = ConfigDict({"every": 500})
  return config.lock()
