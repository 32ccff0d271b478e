"""Trains the VAE in a workdir, in any number of starts, and writes it in diffusers' layout.

Clips are decoded while training runs. The driver of steps, the state, the meshes and the
checkpoints are those of the transformer's training.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jaxtyping import UInt8

from cogvideox_jax import hosts, sharding
from cogvideox_jax.config.checks import check_values
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.data.decoding import Decoders
from cogvideox_jax.data.files import disk_errors
from cogvideox_jax.data.planned_batches import PlannedBatches
from cogvideox_jax.errors import UserError
from cogvideox_jax.exclusive import exclusive
from cogvideox_jax.training import (
  checkpoint,
  drive,
  global_batch,
  resume,
  stages,
  vae_clips,
  vae_stages,
)
from cogvideox_jax.training.bad_steps import GoBackError
from cogvideox_jax.training.drive import Every
from cogvideox_jax.training.metrics import Numbers, Report
from cogvideox_jax.training.session import Session, opened, say
from cogvideox_jax.training.state import TrainState
from cogvideox_jax.training.step_functions import Functions, jit_train
from cogvideox_jax.training.vae_clips import Batches
from cogvideox_jax.training.vae_export import export
from cogvideox_jax.training.vae_functions import load_frozen, make_vae_functions
from cogvideox_jax.training.vae_preview import Previewer
from cogvideox_jax.training.vae_stages import VAEStage
from cogvideox_jax.types import Params

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
  vae_stages.check(config)
  with exclusive(workdir) as check_lock:
    return _train(config, workdir, check_lock)


def _train(config: VAETrainConfig, workdir: epath.Path, check_lock: Callable[[], None]) -> int:
  """Trains in a workdir that no other job writes to."""
  config, line = resume.with_former_keys(workdir, config)
  steps_before = resume.check_config(workdir, config)
  if line:
    say(line)
  frozen = load_frozen(config.loss)
  with Decoders(DECODERS, config.data.limits) as decoders:
    run = Run(config, workdir, decoders, frozen)
    with disk_errors(workdir):
      if hosts.is_first():
        resume.store(workdir, config, run.data_digests)
    with opened(
      workdir,
      keep=config.checkpoint.keep,
      mesh=run.mesh,
      check_lock=check_lock,
      guard=config.guard,
      watchdog=config.watchdog,
    ) as session:
      session.lengthen(steps_before, config.train.steps)
      state = run.go(session)
      exit_code = session.end(int(state.step), steps=config.train.steps)
    if exit_code == 0:
      run.export(state)
  return exit_code


class Run:
  """One start of a training in a workdir. It moves from stage to stage by itself."""

  def __init__(
    self, config: VAETrainConfig, workdir: epath.Path, decoders: Decoders, frozen: Params
  ):
    """Prepares the clips and functions of the remaining stages, and compiles none of them.

    Raises:
      UserError: the mesh, the clips or the workdir do not allow the training.
    """
    self._config, self._workdir, self._frozen = config, workdir, frozen
    start, steps = vae_stages.gan_start(config), config.train.steps
    if vae_stages.has_adversary(config) and start >= steps:
      say(
        f"Warning: config.loss.gan_start is {start}, but the training ends at step {steps}: the "
        "discriminator never takes part."
      )
    source = config.data.path or vae_clips.render(config, workdir / "data" / "clips")
    saved = checkpoint.good_steps(workdir / "checkpoints")
    plan = vae_stages.plan(config)
    first = stages.going_on_at([stage.stage for stage in plan], saved[-1] if saved else 0)
    self._stages = [
      StageRun(config, stage, workdir, source, decoders, frozen)
      for stage in plan
      if stage.stage.start >= first.start
    ]
    self._create_key = _keys(config).create

  @property
  def mesh(self) -> Mesh:
    """The mesh of the stage that the run goes on with."""
    return self._stages[0].mesh

  @property
  def data_digests(self) -> dict[str, str]:
    """The digests of the clips of the stages that remain, by name."""
    return {name: digest for stage in self._stages for name, digest in stage.data_digest.items()}

  def go(self, session: Session) -> TrainState:
    """Takes the remaining steps until a signal comes; the last one is saved."""
    state = self._begin(session, self._stages[0])
    while (step := int(state.step)) < self._config.train.steps:
      run = next(run for run in self._stages if step < run.stage.stage.end)
      stage = run.stage.stage
      if step == stage.start > 0:
        session.log.event("stage", step=stage.start, stage=stage.name)
        say(f"stage {stage.name}, to step {stage.end}")
      try:
        state = run.go(state, session)
      except GoBackError as bad:
        session.go_back(bad)
        state = self._begin(session, run)
      if session.stopping.exit_code is not None:
        break
    return state

  def _begin(self, session: Session, run: "StageRun") -> TrainState:
    """Returns the state to go on from, on the mesh of a stage."""
    functions = run.functions
    return session.begin(
      functions.abstract,
      lambda: functions.create(self._create_key),
      steps=self._config.train.steps,
      frozen=self._frozen,
    )

  def export(self, state: TrainState) -> None:
    """Writes the averaged weights as a VAE in diffusers' layout."""
    frames = self._stages[-1].some_batches(SCALING_BATCHES)
    factor = export(self._workdir / "vae", self._config.model, state.ema, frames)
    say(f"{self._workdir / 'vae'}: the VAE, scaling factor {factor}")


class StageRun:
  """One stage of a run: its mesh, programs and clips."""

  def __init__(
    self,
    config: VAETrainConfig,
    stage: VAEStage,
    workdir: epath.Path,
    source: str,
    decoders: Decoders,
    frozen: Params,
  ):
    """Makes the mesh and the functions of a stage, and plans its batches.

    Args:
      source: the manifest or folder of clips.

    Raises:
      UserError: the mesh, the clips or the workdir do not allow the stage.
    """
    self.stage = stage
    self._config, self._workdir, self._frozen = config, workdir, frozen
    self._rules = sharding.rules_named(config.sharding)
    self.mesh = vae_stages.make_mesh(config, stage, jax.devices())
    self.functions = self._make_functions(adversarial=False)
    clips = vae_clips.open_clips(config, stage, source, decoders)
    name = f"clips of {stage.stage.name}" if config.stages else "clips"
    self.data_digest = {name: clips.train.digest()}
    hosts.check_same("set of clips", self.data_digest[name])
    resume.check_data(workdir, self.data_digest)
    self._train = vae_clips.batches(config, stage, clips.train, decoders)
    self._held_out = None
    if clips.held_out.num_clips:
      self._held_out = vae_clips.batches(config, stage, clips.held_out, decoders)
    self._measure = jax.jit(self.functions.validate)
    self._take_step = self._steps()

  def go(self, state: TrainState, session: Session) -> TrainState:
    """Takes the stage's remaining steps until a signal comes; the last one is saved."""
    config, stage = self._config, self.stage.stage
    state = stages.moved(state, self.functions.abstract)
    done = int(state.step) - stage.start
    plan = session.bad_steps.avoided.stage(stage.name)
    planned = PlannedBatches(self._train, plan)
    with closing(planned.iterate(done, self._rows_here)) as frames:
      clips = (planned.sizes_of(k).clips for k in itertools.count(done))
      batches = zip(itertools.count(int(state.step)), clips, frames, strict=False)
      return drive.take_steps(
        state,
        drive.read_ahead(batches, lambda batch: (batch[0], self._assemble(*batch[1:]))),
        self._take_step,
        session,
        self._report(planned),
        last=stage.end,
        save_every=config.checkpoint.every,
        happenings=self._happenings(),
      )

  def some_batches(self, most: int) -> Iterator[jax.Array]:
    """Yields the first batches of an epoch, at most so many, on the mesh."""
    return (self._batch(self._train, k) for k in range(min(self._train.per_epoch, most)))

  def _make_functions(self, *, adversarial: bool) -> Functions:
    return make_vae_functions(
      self._config, self.stage, self.mesh, self._rules, self._frozen, adversarial=adversarial
    )

  def _steps(self) -> drive.Step:
    """Returns the function that takes a step, with the discriminator from its start on.

    It takes batches with the number of updates done before them.
    """
    key, before = _keys(self._config).train, jit_train(self.functions)
    after, start = before, self._config.train.steps
    if vae_stages.has_adversary(self._config):
      after = jit_train(self._make_functions(adversarial=True))
      start = vae_stages.gan_start(self._config)

    def take(state: TrainState, batch: tuple[int, jax.Array]) -> Any:
      number, frames = batch
      return (before if number < start else after)(state, frames, key)

    return take

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
    key, found = _keys(self._config).validation, []
    for k in range(count):
      frames = self._batch(self._held_out, k)
      found.append(jax.device_get(self._measure(state.ema, frames, key, state.frozen)))
    return {
      f"validation_{name}": float(np.mean([numbers[name] for numbers in found]))
      for name in found[0]
    }

  def _report(self, batches: PlannedBatches) -> Report:
    """Describes the stage's steps for the log."""
    config, first = self._config, self.stage.stage.start + 1

    def describe(step: int, seconds: float) -> Numbers:
      size = batches.sizes_of(step - first)
      return {"epoch": batches.epoch(step - first), "frames": size.clips * size.bucket.num_frames}

    return Report(
      name="train VAE",
      steps=config.train.steps,
      shown=("l1", "psnr"),
      log_every=config.log_every,
      way_out=WAY_OUT,
      describe=describe,
      labels={"stage": self.stage.stage.name} if config.stages else {},
      clips=lambda step: batches.clips(step - first),
      batch=lambda step: batches.number(step - first),
      places=lambda step: {
        "rows": [*range(batches.sizes_of(step - first).clips)],
        "files": sorted(set(batches.clips(step - first))),
      },
      stage=self.stage.stage.name,
      start=self.stage.stage.start,
    )

  def _rows_here(self, clips: int) -> tuple[int, ...]:
    """Returns which rows of a batch of so many clips this host's devices hold."""
    return global_batch.rows_here(self._sharding(clips), clips)

  def _assemble(self, clips: int, frames: UInt8[np.ndarray, "b F H W 3"]) -> jax.Array:
    """Returns the global batch on the mesh, to which this host gives its frames."""
    split = sharding.clip_sharding(self.mesh, self._rules)
    return global_batch.assemble(frames, self._rows_here(clips), clips, split)

  def _batch(self, batches: Batches, k: int) -> jax.Array:
    """Returns batch k on the mesh."""
    return self._assemble(batches.sizes_of(k).clips, batches.batch(k, self._rows_here))

  def _sharding(self, clips: int) -> NamedSharding:
    """Returns the sharding of a batch of so many clips; a UserError if they do not divide."""
    shards = sharding.row_shards(self.mesh, self._rules)
    microbatches = self._config.train.microbatches
    if clips % (shards * microbatches):
      raise UserError(
        f"a batch of {clips} clips does not divide over the {shards} devices that share it, in "
        f"{microbatches} microbatches.\nSet config.train.batch_multiple={shards * microbatches}, "
        "and config.train.frames to hold so many clips."
      )
    return sharding.row_sharding(self.mesh, self._rules, clips)


class Keys(NamedTuple):
  """The keys of a run."""

  create: jax.Array  # Draws the initial weights.
  train: jax.Array  # Draws for the steps.
  validation: jax.Array


def _keys(config: VAETrainConfig) -> Keys:
  create, train = jax.random.split(jax.random.key(config.seed))
  return Keys(create, train, jax.random.fold_in(train, VALIDATION_FOLD))
