"""A training run of a few seconds: random latents, a transformer of two layers, no VAE weights."""

import numpy as np
from drawn import VAE_CONFIG
from typed_config import typed

from cogvideox_jax.conversion import component_fields, diffusers
from cogvideox_jax.data.shards import ShardWriter
from cogvideox_jax.types import Example
from configs import tiny

TEXT = (6, 8)  # Tokens, width.
CHANNELS = 4
GRIDS = ((1, 4, 4), (2, 4, 6), (3, 4, 4), (3, 6, 4))  # Latent frames, height, width.


def make_inputs(folder, seed=0, clips=48):
  """FOLDER/data, an encoded dataset of stage `tiny`, and FOLDER/model, the config of its VAE."""
  write_dataset(folder / "data" / "tiny", seed, clips)
  diffusers.write_fields(
    folder / "model" / "vae", "config.json", component_fields.write_vae(VAE_CONFIG)
  )
  return folder


def write_dataset(folder, seed, clips=48, grids=GRIDS, scores=None):
  """An encoded dataset of random clips, the n-th of which has the n-th score if there are any."""
  rng = np.random.default_rng(seed)
  writer = ShardWriter(folder, 1, f"seed {seed}")
  examples = [_example(rng, number, grids[number % len(grids)]) for number in range(clips)]
  if scores is not None:
    examples = [one._replace(score=float(s)) for one, s in zip(examples, scores, strict=True)]
  writer.write_shard(0, examples)
  writer.finalize()


def _example(rng, number, grid):
  frames, height, width = grid
  shape = (frames, height, width, CHANNELS)
  return Example(
    mean=rng.normal(size=shape).astype(np.float32),
    logvar=rng.normal(-4, 1, size=shape).astype(np.float32),
    text=rng.normal(size=TEXT).astype(np.float32),
    caption=f"clip {number}",
    source=f"{number}.mp4",
    num_frames=4 * frames - 3,
    height=4 * height,
    width=4 * width,
    fps=8.0,
  )


def settings(inputs, **changes):
  """What to change in configs/tiny.py, by dotted key; `__` stands for a dot in `changes`."""
  return {
    "data.path": str(inputs / "data"),
    "data.validation_fraction": 0.2,
    "components": str(inputs / "model"),
    "model.depth": 2,
    "model.heads": 2,
    "model.head_dim": 16,
    "model.time_width": 16,
    "model.in_channels": CHANNELS,
    "model.out_channels": CHANNELS,
    "model.text_length": TEXT[0],
    "model.text_width": TEXT[1],
    "stages.tiny.row_tokens": 48,
    "stages.tiny.max_clips": 4,
    "optimizer.warmup_steps": 2,
    "train.steps": 6,
    "checkpoint.every": 2,
    "validation.every": 3,
    "preview.every": 0,
    "log_every": 1,
  } | {key.replace("__", "."): value for key, value in changes.items()}


def make_config(inputs, **changes):
  """The typed config of a run on `inputs`."""
  return typed(tiny.get_config(), **settings(inputs, **changes))


def config_flags_of(values):
  """The command line's flags for `settings`."""
  return [f"--config.{key}={value}" for key, value in values.items()]
