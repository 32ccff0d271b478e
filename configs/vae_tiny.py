"""The tiny VAE, trained on the embedded clips: compresses 4x in space and in time.

python -m cogvideox_jax.train_vae --config=configs/vae_tiny.py --workdir=runs/vae_tiny

What is not sized for the shapes is ours as well: the training of the published VAE was never
released (paper 2.1 names its losses, not their weights).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0

  config.model = ConfigDict()  # Fields of models.vae.VAEConfig but the measured scaling factor.
  config.model.in_channels = 3
  config.model.channels = (16, 32, 64)
  config.model.latent_channels = 16
  config.model.resnets = 1
  config.model.groups = 8
  config.model.temporal_compression = 4

  config.data = ConfigDict()
  config.data.path = ""  # Manifest or folder of videos; "": the embedded clips.
  config.data.clips = 1200  # How many embedded clips to render.
  config.data.fps = 8.0
  config.data.sizes = ((32, 32), (24, 40))
  config.data.durations = (1, 17)
  config.data.validation_fraction = 0.01  # Of the files, chosen by their names; ours.

  config.train = ConfigDict()
  config.train.steps = 1500
  config.train.frames = 64  # Of a batch, which holds clips of one bucket.
  config.train.batch_multiple = 1  # Clips of a batch divide by it: the devices that share a batch.

  config.loss = ConfigDict()
  config.loss.l1 = 0.1  # Weights of means over pixels of [-1, 1],
  config.loss.l2 = 1.0  # on which L2 alone learns edges sooner than L1 (measured),
  config.loss.kl = 1e-4  # and of the divergence from the unit normal, a mean over the latents.

  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 100
  config.optimizer.final_fraction = 0.01
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.eps = 1e-8
  config.optimizer.weight_decay = 1e-4
  config.optimizer.clip_norm = 1.0
  config.optimizer.ema_decay = 0.995

  # Devices along each axis, in each slice of the job; one may be -1: all that are left.
  config.mesh = ConfigDict({"data": 1, "fsdp": -1, "context": 1, "tensor": 1})
  config.sharding = "fsdp"
  config.cpu_devices = 1  # How many devices a CPU counts as.

  config.log_every = 20
  config.validation = ConfigDict({"every": 500, "batches": 8})
  config.checkpoint = ConfigDict({"every": 500, "keep": 2})
  config.preview = ConfigDict({"every": 500})
  return config.lock()
