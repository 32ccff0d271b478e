"""The training loop: from a config and a workdir to a trained model, over any number of starts."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from cogvideox_jax import hosts, sharding
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.data import mixture
from cogvideox_jax.data.files import disk_errors
from cogvideox_jax.data.loader import Loader
from cogvideox_jax.data.rows import DroppedCaption
from cogvideox_jax.inference.progress import COMPILE, Progress
from cogvideox_jax.interrupts import Interrupts
from cogvideox_jax.training import (
  checkpoint,
  global_batch,
  meshes,
  resume,
  stage_data,
  stages,
  step_functions,
)
from cogvideox_jax.training.checkpoint import Checkpoints
from cogvideox_jax.training.metrics import Recorder, RunLog
from cogvideox_jax.training.preview import Previewer
from cogvideox_jax.training.stages import Stage
from cogvideox_jax.training.state import Params, TrainState
from cogvideox_jax.training.step_functions import jit_train
from cogvideox_jax.training.stopping import Stopping
from cogvideox_jax.types import Batch

# Where on the noise schedule the validation loss is taken, as fractions of its steps; ours.
VALIDATION_POINTS = (0.1, 0.3, 0.5, 0.7, 0.9)
READ_AHEAD = 2  # Batches that are on the device before their step.


def train(config: TrainConfig, workdir: epath.Path) -> int:
  """Trains until config.train.steps, from the workdir's newest good checkpoint if it has one.

  Returns:
    The exit code: 0, or once a signal came and the state is saved, that signal's.

  Raises:
    UserError: the config, the data or the workdir do not allow it; before any compile.
  """
  with disk_errors(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
  resume.check_config(workdir, config)
  open_model(config.components)  # Refused here if there is none: its VAE's scale is trained for.
  run = Run(config, workdir)
  with disk_errors(workdir):
    if hosts.is_first():
      resume.store(workdir, config, run.data_digests)
    log = RunLog(workdir)

  def on_saved(step: int, digest: str) -> None:
    log.event("checkpoint_saved", step=step, digest=digest)
    log.upload()

  folder = workdir / "checkpoints"
  with (
    closing(log),
    Interrupts() as interrupts,
    Checkpoints(folder, keep=config.checkpoint.keep, on_saved=on_saved) as checkpoints,
  ):
    stopping = Stopping(interrupts, run.mesh)
    value = run.start(checkpoints, log)
    step = run.go(value, checkpoints, log, stopping)
    hosts.wait("trained")  # Until the first has written all that is left.
  if stopping.exit_code is None or step == config.train.steps:
    say(f"Trained for {step} steps: {folder / str(step)}")
    return 0
  say(f"Stopped at step {step}, which is saved. The same command goes on from there.")
  return stopping.exit_code


class Programs(NamedTuple):
  """What is compiled before the first step."""

  train: Callable[..., Any]
  validate: Callable[..., Any]


class Outlets(NamedTuple):
  """Where a run's steps leave something, and what may stop them."""

  checkpoints: Checkpoints
  log: RunLog
  previewer: Previewer | None
  stopping: Stopping


class Run:
  """One start of the training of a workdir: it moves from stage to stage by itself."""

  def __init__(self, config: TrainConfig, workdir: epath.Path):
    """Prepares all that needs no compiled program of the transformer, of the stages to come."""
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
    self._create_key, *_ = _keys(config)

  @property
  def mesh(self) -> Mesh:
    """Of the stage that the run goes on with."""
    return self._prepare(self._next).mesh

  @property
  def data_digests(self) -> dict[str, str]:
    """Of the datasets of the stages that are prepared."""
    parts = self._prepared.values()
    return {name: digest for part in parts for name, digest in part.data_digests.items()}

  def start(self, checkpoints: Checkpoints, log: RunLog) -> TrainState:
    """The state to go on from, restored or new; says which."""
    functions = self._prepare(self._next).functions
    restored = checkpoints.restore(functions.abstract)
    for step, reason in (restored.skipped if restored else {}).items():
      log.event("checkpoint_skipped", step=step, reason=reason)
      say(f"Passed over the checkpoint of step {step}: {reason}.")
    value = restored.state if restored else functions.create(self._create_key)
    step = int(value.step)
    log.event("resumed", step=step)
    say(f"resumed at step {step} of {self._steps}" if restored else f"new run, {self._steps} steps")
    return value

  def go(self, value: TrainState, checkpoints: Checkpoints, log: RunLog, stopping: Stopping) -> int:
    """Takes the steps that are left. Returns the last one taken, which is saved by then."""
    step = int(value.step)
    outlets = Outlets(checkpoints, log, self._previewer, stopping)
    while step < self._steps:
      stage = stages.going_on_at(self._plan, step)
      if step == stage.start > 0:
        log.event("stage", step=step, stage=stage.name)
        say(f"stage {stage.name}, to step {stage.end}")
      value, step = self._prepare(stage).go(value, outlets)
      if stopping.exit_code is not None:
        break
    checkpoints.wait()
    return step

  def _prepare(self, stage: Stage) -> "StageRun":
    if stage.name not in self._prepared:
      self._prepared[stage.name] = StageRun(self._config, stage, self._workdir, self._drop)
    return self._prepared[stage.name]


class StageRun:
  """One stage of a run: its mesh, programs and data."""

  def __init__(self, config: TrainConfig, stage: Stage, workdir: epath.Path, drop: DroppedCaption):
    self._config, self._stage, self._workdir = config, stage, workdir
    self._settings = config.stages[stage.name]
    self.mesh, rules = meshes.make_mesh(config, stage.name)
    batch = meshes.abstract_batch(config, stage.name, self.mesh, rules)
    self._places = jax.tree.map(lambda x: x.sharding, batch)
    rows = self._settings.rows
    self._mine = global_batch.rows_here(sharding.row_sharding(self.mesh, rules, rows), rows)
    self.functions = step_functions.make_functions(config, stage.name, self.mesh, rules)
    datasets = stage_data.open_data(config, stage.name, workdir)
    self.data_digests = stage_data.data_digests(config, stage.name, datasets)
    resume.check_data(workdir, self.data_digests)
    self._datasets = stage_data.make_rows(config, stage.name, datasets, "train", drop)
    self._held_out = None
    if config.validation.every:
      held_out = stage_data.make_rows(config, stage.name, datasets, "validation", drop)
      sizes = {name: rows.per_epoch for name, rows in held_out.items()}
      # Every held-out clip equally often, whatever the weights of the mixture.
      self._held_out = stage_data.make_loader(
        config, stage.name, held_out, mixture.begin(sizes), self._mine
      )
      self._held_out_batches = min(
        config.validation.batches, -(-sum(sizes.values()) // self._settings.rows)
      )
    # On CPU, steps that are not waited for can deadlock where devices are many.
    self._waits = self.mesh.devices.flat[0].platform == "cpu"
    _, self._train_key, self._validation_key = _keys(config)

  def go(self, value: TrainState, outlets: Outlets) -> tuple[TrainState, int]:
    """Takes the stage's steps that are left, unless a signal comes; the last one is saved."""
    config, stage = self._config, self._stage
    value = stages.enter(config, stage, value, self.functions.abstract)
    done = int(value.step) - stage.start
    weights = stage_data.weights(config, stage.name)
    history = resume.go_on_mixing(self._workdir, stage.name, weights, done * self._settings.rows)
    loader = stage_data.make_loader(config, stage.name, self._datasets, history, self._mine)
    with closing(loader.iterate(done)) as rows:
      batches = self._read_ahead(rows)
      first = next(batches)
      programs = self._compile(value, first)
      before, steps = stage.start + done, config.train.steps
      with tqdm(desc="train", initial=before, total=steps, disable=not hosts.is_first()) as bar:
        recorder = self._recorder(outlets.log, loader, bar)
        for step, batch in enumerate(itertools.chain([first], batches), start=before + 1):
          outlets.stopping.ask()
          value, metrics = programs.train(value, batch, self._train_key)
          if self._waits:
            jax.block_until_ready(value)
          measure = None
          if self._held_out and is_due(step, config.validation.every):
            measure = partial(self._validate, programs, self._held_out, value.ema)
          recorder.add(step, metrics, measure)
          stops = outlets.stopping.is_due() or step == stage.end
          if stops or is_due(step, config.checkpoint.every):
            recorder.drain()  # So that nothing is saved that is not finite.
            outlets.checkpoints.save(step, value)
          if outlets.previewer and is_due(step, config.preview.every):
            outlets.previewer.write(step, stages.stage_model(config, stage.name), value.ema)
          outlets.checkpoints.check()
          if stops:
            break
          recorder.restart_clock()
    return value, step

  def _compile(self, value: TrainState, batch: Batch) -> Programs:
    train = jit_train(self.functions)
    validate = jax.jit(self.functions.validate)
    progress = Progress()
    with progress.phase(COMPILE, 2 if self._held_out else 1) as bar:
      train = train.lower(value, batch, self._train_key).compile()
      bar.update()
      if self._held_out:
        validate = validate.lower(value.ema, batch, *self._validation_noise()).compile()
        bar.update()
    say(f"compiled in {progress.seconds[COMPILE]:.1f} s")
    return Programs(train, validate)

  def _validate(self, programs: Programs, held_out: Loader, params: Params) -> dict[str, float]:
    """The loss on the held-out clips, by timestep and over all: always the same clips and noise."""
    noise = self._validation_noise()
    losses = np.mean(
      [
        jax.device_get(programs.validate(params, self._place(held_out.batch(k)), *noise))
        for k in range(self._held_out_batches)
      ],
      axis=0,
    )
    each = {f"validation_loss_{t}": float(loss) for t, loss in zip(noise[1], losses, strict=True)}
    return {"validation_loss": float(losses.mean()), **each}

  def _validation_noise(self) -> tuple[jax.Array, np.ndarray]:
    points = np.array(VALIDATION_POINTS) * self._config.noise.steps
    return self._validation_key, points.astype(np.int32)

  def _recorder(self, log: RunLog, loader: Loader, bar: tqdm) -> Recorder:
    return Recorder(
      log,
      loader,
      bar,
      stage=self._stage.name,
      first=self._stage.start + 1,
      tokens=self._settings.rows * self._settings.row_tokens,
      every=self._config.log_every,
      lag=0 if self._waits else READ_AHEAD,
    )

  def _read_ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Batches on the mesh, each put there while earlier ones are computed with."""
    waiting: deque[Batch] = deque()
    for batch in batches:
      waiting.append(self._place(batch))
      if len(waiting) > READ_AHEAD:
        yield waiting.popleft()

  def _place(self, batch: Batch) -> Batch:
    """This host's rows as its part of the global batch."""
    return global_batch.place(batch, self._mine, self._settings.rows, self._places)


def _keys(config: TrainConfig) -> jax.Array:
  """Of the weights as drawn, of the training's noise, and of the validation's."""
  return jax.random.split(jax.random.key(config.seed), 3)


def is_due(step: int, every: int) -> bool:
  """Whether something done `every` so many steps, never if that is 0, is to be done at `step`."""
  return every > 0 and step % every == 0


def say(text: str) -> None:
  """A line in the terminal, once for all processes of a job."""
  if hosts.is_first():
    print(text, flush=True)
