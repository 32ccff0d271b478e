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
  config.model = model()
  config.data = data()
  config.train = ConfigDict()
  config.train.steps = 1500
  config.train.frames = 64
  config.train.batch_multiple = 1
  config.train.microbatches = 1
  config.train.remat = False
  config.stages = ConfigDict()
  config.loss = loss()
  config.discriminator = discriminator()
  config.optimizer = optimizer()
  config.mesh = ConfigDict({"data": 1, "fsdp": -1, "context": 0, "tensor": 1})
  config.sharding = "fsdp"
  config.cpu_devices = 1

  config.log_every = 20
  config.checkpoint = ConfigDict({"every": 500, "keep": 2})
  config.guard = ConfigDict({"in_a_row": 5, "spike": 20.0})
  config.watchdog = ConfigDict({"seconds": 1800.0})
  config.validation = ConfigDict({"every": 500, "batches": 8})
  config.preview = ConfigDict({"every": 500})
  return config.lock()


def model() -> ConfigDict:
  """Returns the sizes of the VAE."""
  config = ConfigDict()
  config.in_channels = 3
  config.channels = (16, 32, 64)
  config.latent_channels = 16
  config.resnets = 1
  config.groups = 8
  config.temporal_compression = 4
  return config


def data() -> ConfigDict:
  """Returns which clips to train on."""
  config = ConfigDict()
  config.path = ""
  config.clips = 1200
  config.fps = 8.0
  config.more_fps = ()
  config.image_share = 0.0
  config.sizes = ((32, 32), (24, 40))
  config.durations = (1, 17)
  config.validation_fraction = 0.01
  config.limits = ConfigDict()
  config.limits.max_pixels = 36_000_000
  config.limits.max_picture_pixels = 256_000_000
  config.limits.max_frames = 0
  config.limits.max_seconds = 86_400.0
  config.limits.max_bytes = 0
  config.limits.max_fps = 1000.0
  config.subfolders = True
  config.allow_links = False
  return config


def loss() -> ConfigDict:
  """Returns the weights of the loss."""
  config = ConfigDict()
  config.l1 = 0.1
  config.l2 = 1.0
  config.kl = 1e-4
  config.perceptual = 0.0
  config.perceptual_frames = 0
  config.adversarial = 0.0
  config.adaptive = False
  config.gan_start = 0.5
  return config


def discriminator() -> ConfigDict:
  """Returns the discriminator, which takes part if loss.adversarial is not 0."""
  config = ConfigDict()
  config.model = ConfigDict()
  config.model.channels = (16, 32, 32)
  config.model.temporal_levels = 2
  config.model.groups = 8
  config.learning_rate = 1e-3
  config.b1 = 0.5
  config.b2 = 0.9
  config.r1 = 0.0
  config.frames = 0
  return config


def optimizer() -> ConfigDict:
  """Returns AdamW, its schedule and the moving average."""
  config = ConfigDict()
  config.learning_rate = 2e-3
  config.warmup_steps = 1 / 15
  config.final_fraction = 0.01
  config.b1 = 0.9
  config.b2 = 0.95
  config.eps = 1e-8
  config.weight_decay = 1e-4
  config.clip_norm = 1.0
  config.ema_decay = 0.995
  return config
