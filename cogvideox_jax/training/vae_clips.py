"""Renders or opens the clips of the VAE's training, and plans the batches of a stage."""

from functools import partial
from typing import NamedTuple

from etils import epath

from cogvideox_jax import hosts
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.data import measured_clips, shape_clips
from cogvideox_jax.data.clip_batches import ClipBatches
from cogvideox_jax.data.decoding import Decoders
from cogvideox_jax.data.interleaved_batches import InterleavedBatches
from cogvideox_jax.data.measured_clips import MeasuredClips
from cogvideox_jax.training.session import say
from cogvideox_jax.training.vae_stages import VAEStage

Batches = ClipBatches | InterleavedBatches


class Clips(NamedTuple):
  """The clips to train on, and those that are held out for validation."""

  train: MeasuredClips
  held_out: MeasuredClips


def render(config: VAETrainConfig, folder: epath.Path) -> str:
  """Renders the embedded clips into a folder, once for all hosts, and returns their manifest."""
  data = config.data
  render_here = partial(
    shape_clips.render_dataset,
    folder,
    data.clips,
    config.seed,
    sizes=data.sizes,
    durations=data.durations,
    fps=data.fps,
  )
  if hosts.is_first():
    render_here()
  hosts.wait("rendered")
  return str(render_here())  # Finds the clips rendered, and returns their path.


def open_clips(config: VAETrainConfig, stage: VAEStage, source: str, decoders: Decoders) -> Clips:
  """Measures the clips of a stage.

  Args:
    source: a manifest or folder.

  Raises:
    UserError: no clip can be used.
  """
  data, validates = config.data, bool(config.validation.every)
  clips = measured_clips.measure(
    source,
    stage.config.sizes,
    stage.config.durations,
    data.fps,
    decoders,
    data.more_fps,
    subfolders=data.subfolders,
    allow_links=data.allow_links,
  )
  train, held_out = clips.split(data.validation_fraction if validates else 0.0)
  if validates and not held_out.num_clips:
    say(
      f"None of the {clips.num_clips} clips is held out by config.data.validation_fraction, so "
      "that there is no validation."
    )
  return Clips(train, held_out)


def batches(
  config: VAETrainConfig, stage: VAEStage, clips: MeasuredClips, decoders: Decoders
) -> Batches:
  """Plans batches of the clips as the config says."""

  def plan(chosen: MeasuredClips) -> ClipBatches:
    return ClipBatches(
      chosen,
      decoders,
      frames=stage.config.frames,
      seed=config.seed,
      multiple_of=stage.config.batch_multiple,
    )

  videos = clips.videos()
  if not config.data.image_share or not videos.num_clips:
    return plan(clips)
  return InterleavedBatches(plan(clips.stills()), plan(videos), config.data.image_share)
