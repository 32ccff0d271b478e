"""Trains the VAE in a workdir, in any number of starts, and writes it in diffusers' layout.

Clips are decoded while training runs. The driver of steps, the state, the meshes and the
checkpoints are those of the transformer's training.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jaxtyping import UInt8

from cogvideox_jax import hosts, sharding
from cogvideox_jax.config.checks import check_values
from cogvideox_jax.config.schema import VAETrainConfig
from cogvideox_jax.data import buckets, measured_clips, shape_clips
from cogvideox_jax.data.clip_batches import ClipBatches
from cogvideox_jax.data.decoding import Decoders
from cogvideox_jax.data.files import disk_errors
from cogvideox_jax.data.measured_clips import MeasuredClips
from cogvideox_jax.errors import UserError
from cogvideox_jax.exclusive import exclusive
from cogvideox_jax.training import drive, global_batch, optimizer, resume
from cogvideox_jax.training.drive import Every
from cogvideox_jax.training.metrics import Numbers, Report
from cogvideox_jax.training.session import Session, opened, say
from cogvideox_jax.training.state import TrainState
from cogvideox_jax.training.step_functions import jit_train
from cogvideox_jax.training.vae_export import export
from cogvideox_jax.training.vae_functions import make_vae_functions
from cogvideox_jax.training.vae_preview import Previewer

SCALING_BATCHES = 256  # The scaling factor is measured on at most so many batches of an epoch.
# Folded into the training's key for validation, as steps are; larger than any step.
VALIDATION_FOLD = 2**31 - 1
DECODERS = min(os.cpu_count() or 1, 16)  # Decode processes of each host.
WAY_OUT = (
  "Train anew in another workdir, with\na smaller config.optimizer.learning_rate, or look for odd "
  "clips in the data."
)


def train(config: VAETrainConfig, workdir: epath.Path) -> int:
  """Trains until config.train.steps, from the workdir's newest good checkpoint if it has one.

  Writes WORKDIR/vae at the end: the averaged weights, and the scaling factor measured on the clips.

  Returns:
    The exit code: 0, or after a signal the signal's, with the state saved.

  Raises:
    UserError: the config, the data or the workdir do not allow it. Nothing is compiled before.
  """
  check_values(config)
  multiple = config.model.spatial_compression
  buckets.check(config.data.sizes, config.data.durations, multiple_of=multiple)
  buckets.check_restored(config.data.durations, config.model.temporal_compression)
  # Raises if the warm-up is not shorter than the training.
  optimizer.learning_rate(config.optimizer, config.train.steps)
  with exclusive(workdir) as check_lock:
    return _train(config, workdir, check_lock)


def _train(config: VAETrainConfig, workdir: epath.Path, check_lock: Callable[[], None]) -> int:
  """Trains in a workdir that no other job writes to."""
  steps_before = resume.check_config(workdir, config)
  with Decoders(DECODERS, config.data.limits) as decoders:
    run = Run(config, workdir, _open_clips(config, workdir, decoders), decoders)
    with disk_errors(workdir):
      if hosts.is_first():
        resume.store(workdir, config, run.data_digests)
    with opened(
      workdir, keep=config.checkpoint.keep, mesh=run.mesh, check_lock=check_lock
    ) as session:
      session.lengthen(steps_before, config.train.steps)
      state = run.go(session)
      exit_code = session.end(int(state.step), steps=config.train.steps)
    if exit_code == 0:
      run.export(state)
  return exit_code


class Clips(NamedTuple):
  """The clips to train on, and those that are held out for validation."""

  train: MeasuredClips
  held_out: MeasuredClips


class Run:
  """One start of a training in a workdir."""

  def __init__(self, config: VAETrainConfig, workdir: epath.Path, clips: Clips, decoders: Decoders):
    """Makes the mesh and the functions, and plans the batches.

    Raises:
      UserError: the mesh, the clips or the workdir do not allow the training.
    """
    self._config, self._workdir = config, workdir
    self._rules = sharding.rules_named(config.sharding)
    self.mesh = _make_mesh(config)
    self._functions = make_vae_functions(config, self.mesh, self._rules)
    self.data_digests = {"clips": clips.train.digest()}
    hosts.check_same("set of clips", self.data_digests["clips"])
    resume.check_data(workdir, self.data_digests)
    self._train = self._batches(clips.train, decoders)
    self._held_out = self._batches(clips.held_out, decoders) if clips.held_out.num_clips else None
    self._step = jit_train(self._functions)
    self._measure = jax.jit(self._functions.validate)
    self._create_key, self._train_key, self._validation_key = _keys(config)

  def go(self, session: Session) -> TrainState:
    """Takes the remaining steps until a signal comes; the last one is saved."""
    config, functions = self._config, self._functions
    steps = config.train.steps
    state = session.begin(
      functions.abstract, partial(functions.create, self._create_key), steps=steps
    )
    done = int(state.step)
    if done == steps:
      return state
    with closing(self._train.iterate(done, self._rows_here)) as frames:
      clips = (self._train.sizes_of(k).clips for k in itertools.count(done))
      return drive.take_steps(
        state,
        drive.read_ahead(zip(clips, frames, strict=False), lambda batch: self._assemble(*batch)),
        lambda state, frames: self._step(state, frames, self._train_key),
        session,
        self._report(),
        last=steps,
        save_every=config.checkpoint.every,
        happenings=self._happenings(),
      )

  def export(self, state: TrainState) -> None:
    """Writes the averaged weights as a VAE in diffusers' layout."""
    count = min(self._train.per_epoch, SCALING_BATCHES)
    frames = (self._batch(self._train, k) for k in range(count))
    factor = export(self._workdir / "vae", self._config.model, state.ema, frames)
    say(f"{self._workdir / 'vae'}: the VAE, scaling factor {factor}")

  def _batches(self, clips: MeasuredClips, decoders: Decoders) -> ClipBatches:
    """Plans batches of the clips as the config says."""
    return ClipBatches(
      clips,
      decoders,
      frames=self._config.train.frames,
      seed=self._config.seed,
      multiple_of=self._config.train.batch_multiple,
    )

  def _happenings(self) -> list[Every]:
    """Lists what happens every so many steps, besides saving."""
    config, found = self._config, []
    if self._held_out and config.validation.every:
      found.append(Every(config.validation.every, self._validate, measures=True))
    if config.preview.every:
      shown = self._held_out or self._train
      found.append(
        Every(
          config.preview.every, Previewer(config.model, shown, self._workdir / "previews").write
        )
      )
    return found

  def _validate(self, _: int, state: TrainState) -> Numbers:
    """Returns metrics of the averaged weights on held-out clips. Clips and noise never change."""
    assert self._held_out
    count = min(self._config.validation.batches, self._held_out.per_epoch)
    found = []
    for k in range(count):
      frames = self._batch(self._held_out, k)
      found.append(jax.device_get(self._measure(state.ema, frames, self._validation_key)))
    return {
      f"validation_{name}": float(np.mean([numbers[name] for numbers in found]))
      for name in found[0]
    }

  def _report(self) -> Report:
    """Describes the training's steps for the log."""
    config, batches = self._config, self._train

    def describe(step: int, seconds: float) -> Numbers:
      size = batches.sizes_of(step - 1)
      return {"epoch": batches.epoch(step - 1), "frames": size.clips * size.bucket.num_frames}

    return Report(
      name="train VAE",
      steps=config.train.steps,
      shown=("l1", "psnr"),
      log_every=config.log_every,
      way_out=WAY_OUT,
      describe=describe,
      clips=lambda step: batches.clips(step - 1),
    )

  def _rows_here(self, clips: int) -> tuple[int, ...]:
    """Returns which rows of a batch of so many clips this host's devices hold."""
    return global_batch.rows_here(self._sharding(clips), clips)

  def _assemble(self, clips: int, frames: UInt8[np.ndarray, "b F H W 3"]) -> jax.Array:
    """Returns the global batch on the mesh, to which this host gives its frames."""
    return global_batch.assemble(frames, self._rows_here(clips), clips, self._sharding(clips))

  def _batch(self, batches: ClipBatches, k: int) -> jax.Array:
    """Returns batch k on the mesh."""
    return self._assemble(batches.sizes_of(k).clips, batches.batch(k, self._rows_here))

  def _sharding(self, clips: int) -> NamedSharding:
    """Returns the sharding of a batch of so many clips; a UserError if they do not divide."""
    try:
      return sharding.row_sharding(self.mesh, self._rules, clips)
    except UserError as error:
      shards = sharding.row_shards(self.mesh, self._rules)
      raise UserError(
        f"a batch of {clips} clips does not divide over the {shards} devices that share it.\n"
        f"Set config.train.batch_multiple={shards}, and config.train.frames to hold so many clips."
      ) from error


def _open_clips(config: VAETrainConfig, workdir: epath.Path, decoders: Decoders) -> Clips:
  """Measures the clips of the config's path; without a path it renders the embedded ones first."""
  data = config.data
  clips = measured_clips.measure(
    data.path or _render(config, workdir), data.sizes, data.durations, data.fps, decoders
  )
  train, held_out = clips.split(data.validation_fraction if config.validation.every else 0.0)
  if config.validation.every and not held_out.num_clips:
    say(
      f"None of the {clips.num_clips} clips is held out by config.data.validation_fraction, so "
      "that there is no validation."
    )
  return Clips(train, held_out)


def _render(config: VAETrainConfig, workdir: epath.Path) -> str:
  """Renders the embedded clips into the workdir, once for all hosts, and returns their path."""
  data, folder = config.data, workdir / "data" / "clips"
  render = partial(
    shape_clips.render_dataset,
    folder,
    data.clips,
    config.seed,
    sizes=data.sizes,
    durations=data.durations,
    fps=data.fps,
  )
  if hosts.is_first():
    render()
  hosts.wait("rendered")
  return str(render())  # Finds the clips rendered, and returns their path.


def _make_mesh(config: VAETrainConfig) -> Mesh:
  """Makes the mesh over all devices of the job. No two devices share a clip."""
  sizes = sharding.with_context(dataclasses.asdict(config.mesh), 1, jax.devices())
  return sharding.make_mesh(sizes)


def _keys(config: VAETrainConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns three keys: for the initial weights, for the noise of training, and of validation."""
  create_key, train_key = jax.random.split(jax.random.key(config.seed))
  return create_key, train_key, jax.random.fold_in(train_key, VALIDATION_FOLD)
