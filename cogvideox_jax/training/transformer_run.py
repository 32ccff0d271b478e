"""Trains the transformer in a workdir, in any number of starts.

A run goes through its stages. Each stage makes its own mesh, programs and data, and hands them to
the driver of steps.
"""

import itertools
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from cogvideox_jax import hosts, sharding
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.data import mixture
from cogvideox_jax.data.files import disk_errors
from cogvideox_jax.data.left_out import StagePlan
from cogvideox_jax.data.loader import Loader
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.rows import DroppedCaption, EmptySplitError, Rows
from cogvideox_jax.exclusive import exclusive
from cogvideox_jax.inference.progress import COMPILE, Progress
from cogvideox_jax.training import (
  checkpoint,
  drive,
  encoders,
  global_batch,
  meshes,
  phases,
  resume,
  source_facts,
  stage_data,
  stages,
  step_functions,
)
from cogvideox_jax.training.bad_steps import GoBackError
from cogvideox_jax.training.drive import Every
from cogvideox_jax.training.metrics import Numbers, Report
from cogvideox_jax.training.preview import Previewer
from cogvideox_jax.training.session import Session, opened, say
from cogvideox_jax.training.stages import Stage
from cogvideox_jax.training.state import TrainState
from cogvideox_jax.training.step_functions import jit_train
from cogvideox_jax.types import Batch, Params

# The timesteps of the validation loss, as fractions of the noise schedule's steps; ours.
VALIDATION_POINTS = (0.1, 0.3, 0.5, 0.7, 0.9)
WAY_OUT = (
  "Train on from the newest of them in a new workdir, with\n--config.init_from=THIS_WORKDIR and a "
  "smaller config.optimizer.learning_rate, or look for odd numbers in the data."
)


def train(config: TrainConfig, workdir: epath.Path) -> int:
  """Trains until config.train.steps, from the workdir's newest good checkpoint if it has one.

  Returns:
    The exit code: 0, or after a signal the signal's, with the state saved.

  Raises:
    UserError: the config, the data or the workdir do not allow it. Nothing is compiled before.
  """
  for stage in stages.plan(config):
    stages.learning_rate(config, stage.name)  # Raises if the warm-up is not shorter than the stage.
  with exclusive(workdir) as check_lock:
    return _train(config, workdir, check_lock)


def _train(config: TrainConfig, workdir: epath.Path, check_lock: Callable[[], None]) -> int:
  """Trains in a workdir that no other job writes to."""
  config, line = resume.with_former_keys(workdir, config)
  config = source_facts.settle(config, workdir)
  steps_before = resume.check_config(workdir, config)
  if line:
    say(line)
  open_model(config.components)  # Raises if there are none, because the loss needs the VAE's scale.
  run = Run(config, workdir)
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
    return session.end(run.go(session), steps=config.train.steps)


class Programs(NamedTuple):
  """The programs that are compiled before the first step."""

  train: Callable[..., Any]
  validate: Callable[..., Any]


class Run:
  """One start of a training in a workdir. It moves from stage to stage by itself."""

  def __init__(self, config: TrainConfig, workdir: epath.Path):
    """Prepares the data and functions of the remaining stages, and compiles none of them."""
    self._config, self._steps, self._workdir = config, config.train.steps, workdir
    self._plan = stages.plan(config)
    self._previewer = None
    if config.preview.every and config.preview.prompts:
      self._previewer = Previewer(config, workdir / "previews")
    stage_data.make_data(config, workdir)
    self._drop: DroppedCaption = stage_data.dropped_caption(config)
    saved = checkpoint.good_steps(workdir / "checkpoints")
    self._next = stages.going_on_at(self._plan, saved[-1] if saved else 0)
    self._prepared: dict[str, StageRun] = {}
    for stage in self._plan[self._plan.index(self._next) :]:
      self._prepare(stage)
    prepared = self._prepared.values()
    datasets = {data.directory: data for stage in prepared for data in stage.datasets}
    for line in encoders.check(config, datasets.values()):
      say(line)
    self._create_key, *_ = _keys(config)

  @property
  def mesh(self) -> Mesh:
    """The mesh of the stage that the run goes on with."""
    return self._prepare(self._next).mesh

  @property
  def data_digests(self) -> dict[str, str]:
    """The digests of the datasets of the stages that are prepared, by name."""
    prepared = self._prepared.values()
    return {name: digest for stage in prepared for name, digest in stage.data_digests.items()}

  def go(self, session: Session) -> int:
    """Takes the remaining steps until a signal comes, and returns the number of the last one."""
    state = self._begin(session)
    while (step := int(state.step)) < self._steps:
      stage = stages.going_on_at(self._plan, step)
      if step == stage.start > 0:
        session.log.event("stage", step=step, stage=stage.name)
        say(f"stage {stage.name}, to step {stage.end}")
      try:
        state = self._prepare(stage).go(state, session)
      except GoBackError as bad:
        session.go_back(bad)
        self._next = stage
        state = self._begin(session)
      if session.stopping.exit_code is not None:
        return int(state.step)
    return step

  def _begin(self, session: Session) -> TrainState:
    """Returns the state to go on from, on the mesh of the stage that it continues with."""
    functions = self._prepare(self._next).functions
    return session.begin(
      functions.abstract, partial(functions.create, self._create_key), steps=self._steps
    )

  def _prepare(self, stage: Stage) -> "StageRun":
    """Returns the run of a stage, which is made once."""
    if stage.name not in self._prepared:
      self._prepared[stage.name] = StageRun(
        self._config, stage, self._workdir, self._drop, self._previewer
      )
    return self._prepared[stage.name]


class StageRun:
  """One stage of a run: its mesh, programs and data."""

  def __init__(
    self,
    config: TrainConfig,
    stage: Stage,
    workdir: epath.Path,
    drop: DroppedCaption,
    previewer: Previewer | None,
  ):
    """Makes the mesh and the functions of a stage, and opens its data.

    Args:
      drop: the text states of a dropped caption.

    Raises:
      UserError: the mesh, the data or the workdir do not allow the stage.
    """
    self._config, self._stage, self._workdir = config, stage, workdir
    self._settings, self._previewer = config.stages[stage.name], previewer
    self.mesh, rules = meshes.make_mesh(config, stage.name)
    batch = meshes.abstract_batch(config, stage.name, self.mesh, rules)
    self._shardings = jax.tree.map(lambda x: x.sharding, batch)
    rows = self._settings.rows
    self._mine = global_batch.rows_here(sharding.row_sharding(self.mesh, rules, rows), rows)
    self.functions = step_functions.make_functions(config, stage.name, self.mesh, rules)
    datasets = stage_data.open_data(config, stage.name, workdir)
    self.data_digests = stage_data.data_digests(config, stage.name, datasets)
    resume.check_data(workdir, self.data_digests)
    self._datasets = stage_data.make_rows(config, stage.name, datasets, "train", drop)
    for line in stage_data.repeated_noise(config, stage, self._datasets):
      say(line)
    self._held_out = None
    if held_out := self._held_out_rows(datasets, drop):
      sizes = {name: rows.per_epoch for name, rows in held_out.items()}
      # Weighted by size, so that all held-out clips count equally whatever the mixture's weights.
      self._held_out = stage_data.make_loader(
        config, stage.name, held_out, mixture.begin(sizes), self._mine
      )
      self._held_out_batches = min(
        config.validation.batches, -(-sum(sizes.values()) // self._settings.rows)
      )
    self._programs: Programs | None = None
    _, self._train_key, self._validation_key = _keys(config)

  def _held_out_rows(
    self, datasets: Mapping[str, Dataset], drop: DroppedCaption
  ) -> dict[str, Rows]:
    """Returns the held-out rows of each dataset that has some; says which have none."""
    held_out: dict[str, Rows] = {}
    for name, dataset in datasets.items() if self._config.validation.every else ():
      try:
        made = stage_data.make_rows(
          self._config, self._stage.name, {name: dataset}, "validation", drop
        )
      except EmptySplitError:
        fraction = self._config.data.validation_fraction
        say(
          f"None of the {len(dataset)} clips of {dataset.directory} that fit a row is held out by "
          f"config.data.validation_fraction={fraction}: they are not validated on."
        )
      else:
        held_out |= made
    return held_out

  @property
  def datasets(self) -> list[Dataset]:
    """The datasets that the stage reads."""
    return [rows.dataset for rows in self._datasets.values()]

  def go(self, state: TrainState, session: Session) -> TrainState:
    """Takes the stage's remaining steps until a signal comes; the last one is saved."""
    config, stage = self._config, self._stage
    state = stages.enter(config, stage, state, self.functions.abstract)
    done = int(state.step) - stage.start
    weights = stage_data.weights(config, stage.name)
    plan = session.bad_steps.avoided.stage(stage.name)
    row = plan.batch(done) * self._settings.rows
    history = resume.go_on_mixing(self._workdir, stage.name, weights, row)
    loader = stage_data.make_loader(config, stage.name, self._datasets, history, self._mine, plan)
    with closing(loader.iterate(done)) as rows:
      batches = drive.read_ahead(rows, self._assemble)
      session.phases.enter(phases.DATA, int(state.step) + 1)
      first = next(batches)
      session.phases.enter(phases.COMPILE, int(state.step) + 1)
      programs = self._programs = self._programs or self._compile(state, first)
      return drive.take_steps(
        state,
        itertools.chain([first], batches),
        lambda state, batch: programs.train(state, batch, self._train_key),
        session,
        self._report(loader, plan),
        last=stage.end,
        save_every=config.checkpoint.every,
        happenings=self._happenings(programs),
      )

  def _happenings(self, programs: Programs) -> list[Every]:
    """Lists what happens every so many steps, besides saving."""
    config, held_out, previewer = self._config, self._held_out, self._previewer
    found = []
    if held_out:

      def validate(_: int, state: TrainState) -> Numbers:
        return self._validate(programs, held_out, state.ema)

      found.append(Every(config.validation.every, validate, measures=True))
    if previewer:
      model = stages.stage_model(config, self._stage.name)

      def preview(step: int, state: TrainState) -> None:
        previewer.write(step, model, state.ema)

      found.append(Every(config.preview.every, preview))
    return found

  def _compile(self, state: TrainState, batch: Batch) -> Programs:
    """Compiles the programs of the stage, and says how long that took."""
    step, measure = jit_train(self.functions), jax.jit(self.functions.validate)
    progress = Progress()
    with progress.phase(COMPILE, 2 if self._held_out else 1) as bar:
      step = step.lower(state, batch, self._train_key).compile()
      bar.update()
      if self._held_out:
        measure = measure.lower(state.ema, batch, *self._validation_noise()).compile()
        bar.update()
    say(f"compiled in {progress.seconds[COMPILE]:.1f} s")
    return Programs(train=step, validate=measure)

  def _validate(self, programs: Programs, held_out: Loader, params: Params) -> Numbers:
    """Returns the loss on the held-out clips at each of the timesteps, and their mean.

    Clips, noise and timesteps are always the same.
    """
    noise = self._validation_noise()
    losses = np.mean(
      [
        jax.device_get(programs.validate(params, self._assemble(held_out.batch(k)), *noise))
        for k in range(self._held_out_batches)
      ],
      axis=0,
    )
    each = {f"validation_loss_{t}": float(loss) for t, loss in zip(noise[1], losses, strict=True)}
    return {"validation_loss": float(losses.mean()), **each}

  def _validation_noise(self) -> tuple[jax.Array, np.ndarray]:
    """Returns the key of the validation's noise, and its timesteps."""
    points = np.array(VALIDATION_POINTS) * self._config.noise.steps
    return self._validation_key, points.astype(np.int32)

  def _report(self, loader: Loader, plan: StagePlan) -> Report:
    """Describes the stage's steps for the log."""
    tokens = self._settings.rows * self._settings.row_tokens  # Tokens of a batch, with padding.
    first = self._stage.start + 1  # The step that takes the loader's first batch.

    def describe(step: int, seconds: float) -> Numbers:
      return describe_batch(loader, step - first, tokens, seconds)

    return Report(
      name="train",
      steps=self._config.train.steps,
      shown=("loss",),
      log_every=self._config.log_every,
      way_out=WAY_OUT,
      describe=describe,
      labels={"stage": self._stage.name},
      clips=lambda step: loader.clips(step - first),
      batch=lambda step: plan.batch(step - first),
      places=lambda step: {
        "rows": [*loader.all_rows_of(step - first)],
        "files": loader.files(step - first),
      },
      stage=self._stage.name,
      start=self._stage.start,
    )

  def _assemble(self, batch: Batch) -> Batch:
    """Returns the global batch on the mesh, to which this host gives its rows."""
    return global_batch.assemble(batch, self._mine, self._settings.rows, self._shardings)


def describe_batch(loader: Loader, k: int, tokens: int, seconds: float) -> Numbers:
  """Returns what the log says about batch k: its padding, its epoch, and tokens per second.

  `epoch` is the largest of all datasets. If there are several, each dataset's epoch is logged, too.

  Args:
    tokens: tokens of the batch, padding included.
    seconds: how long its step took.
  """
  padding, by_dataset = loader.padding_fraction(k), loader.epochs(k)
  each = {f"epoch_{name}": epoch for name, epoch in by_dataset.items()}
  return {
    "tokens_per_second": tokens * (1 - padding) / seconds,
    "padding_fraction": padding,
    "epoch": max(by_dataset.values()),
    **(each if len(each) > 1 else {}),
  }


def _keys(config: TrainConfig) -> jax.Array:
  """Returns three keys: for the initial weights, for the noise of training, and of validation."""
  return jax.random.split(jax.random.key(config.seed), 3)
