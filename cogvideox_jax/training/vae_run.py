"""The VAE's training loop: from a config and a workdir to a VAE in diffusers' layout."""

import dataclasses
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from tqdm import tqdm

from cogvideox_jax.config.checks import check_values
from cogvideox_jax.config.schema import VAETrainConfig
from cogvideox_jax.conversion import diffusers
from cogvideox_jax.data import buckets, shapes, video
from cogvideox_jax.data.files import disk_errors
from cogvideox_jax.interrupts import Interrupts
from cogvideox_jax.models import vae
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.training import optimizer, resume, state
from cogvideox_jax.training.checkpoint import Checkpoints
from cogvideox_jax.training.metrics import RunLog
from cogvideox_jax.training.state import TrainState
from cogvideox_jax.training.vae_step import (
  Clips,
  LossWeights,
  measure_scaling_factor,
  read_clips,
  to_float,
  vae_step,
)

PREVIEW_CLIPS = 4


def train(config: VAETrainConfig, workdir: epath.Path) -> int:
  """Trains on one device until config.train.steps, resuming from the workdir's checkpoints.

  Leaves WORKDIR/vae: the averaged weights, with the scaling factor measured on the clips.

  Returns:
    The exit code: 0, or what a signal asks for, once the state is saved.

  Raises:
    UserError: the config, the data or the workdir do not allow it; before any compile.
  """
  check_values(config)
  multiple = config.model.spatial_compression
  buckets.check(config.data.sizes, config.data.durations, multiple_of=multiple)
  with disk_errors(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
  resume.check_config(workdir, config)
  clips = read_clips(_manifest(config, workdir), config.data)
  with disk_errors(workdir):
    resume.store(workdir, config, {})
    log = RunLog(workdir)

  def on_saved(step: int, digest: str) -> None:
    log.event("checkpoint_saved", step=step, digest=digest)

  folder = workdir / "checkpoints"
  with Checkpoints(folder, keep=config.checkpoint.keep, on_saved=on_saved) as checkpoints:
    run = Run(config, workdir, clips, log)
    value, exit_code = run.go(checkpoints)
  log.close()
  if exit_code == 0:
    _export(config, workdir, run.model(value.ema), clips)
  return exit_code


class Run:
  """One start of the training of a workdir."""

  def __init__(self, config: VAETrainConfig, workdir: epath.Path, clips: Clips, log: RunLog):
    self._config, self._workdir, self._clips, self._log = config, workdir, clips, log
    self._tx = optimizer.make_optimizer(
      config.optimizer, optimizer.learning_rate(config.optimizer, config.train.steps)
    )
    self._graphdef = nnx.split(nnx.eval_shape(partial(_new_model, config, jax.random.key(0))))[0]
    step = partial(
      vae_step,
      graphdef=self._graphdef,
      tx=self._tx,
      weights=LossWeights(**dataclasses.asdict(config.loss)),
      ema_decay=config.optimizer.ema_decay,
    )
    self._step = jax.jit(step, donate_argnums=0)
    self._create_key, self._train_key = jax.random.split(jax.random.key(config.seed))

  def go(self, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    """Runs from the newest good checkpoint to the end, or to a signal."""
    config, value = self._config, self._start(checkpoints)
    first, steps = int(value.step), config.train.steps
    with Interrupts() as interrupts, tqdm(total=steps, initial=first, desc="Training VAE") as bar:
      for step in range(first + 1, steps + 1):
        begin = time.perf_counter()
        batch = self._clips.batch(config.train.frames, config.seed, step)
        value, metrics = self._step(value, batch, self._train_key)
        jax.block_until_ready(metrics)
        bar.update()
        if step % config.log_every == 0:
          numbers = {name: float(metric) for name, metric in metrics.items()}
          bar.set_postfix(l1=f"{numbers['l1']:.4f}", psnr=f"{numbers['psnr']:.1f}")
          self._log.metrics(step, {**numbers, "step_seconds": time.perf_counter() - begin})
        stopping = interrupts.exit_code is not None
        if step % config.checkpoint.every == 0 or step == steps or stopping:
          checkpoints.save(step, value)
        if config.preview.every and step % config.preview.every == 0:
          self._preview(step, value)
        if stopping:
          checkpoints.wait()
          tqdm.write(f"Saved step {step} in {self._workdir}. The same command goes on from there.")
          return value, interrupts.exit_code or 0
      checkpoints.wait()
    return value, 0

  def model(self, params: state.Params) -> VAE:
    return nnx.merge(self._graphdef, params)

  def _start(self, checkpoints: Checkpoints) -> TrainState:
    def create(key):
      model = _new_model(self._config, key)
      return state.new_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), self._tx)

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      jax.eval_shape(create, self._create_key),
    )
    restored = checkpoints.restore(abstract)
    value = restored.state if restored else jax.jit(create)(self._create_key)
    self._log.event("resumed", step=int(value.step))
    if restored:
      tqdm.write(f"Resumed at step {int(value.step)}.")
    return value

  def _preview(self, step: int, value: TrainState) -> None:
    """Some clips above their reconstructions, with the averaged weights."""
    clips = max(self._clips.by_bucket.values(), key=lambda clips: clips.shape[1])[:PREVIEW_CLIPS]
    model = self.model(value.ema)
    mean, _ = vae.encode(model, to_float(jnp.asarray(clips)))
    restored = to_bytes(vae.decode(model, mean))
    pairs = [frames for pair in zip(clips, restored, strict=True) for frames in pair]
    folder = self._workdir / "previews"
    folder.mkdir(exist_ok=True)
    labels = ["clip", "reconstruction"] * len(clips)
    video.contact_sheet(pairs, labels, folder / f"step_{step:06d}.png")


def to_bytes(frames: jax.Array) -> np.ndarray:
  """[-1, 1] to bytes."""
  return np.asarray(jnp.round((jnp.clip(frames, -1, 1) + 1) * 127.5).astype(jnp.uint8))


def _new_model(config: VAETrainConfig, key: jax.Array) -> VAE:
  return VAE(config.model, rngs=nnx.Rngs(key))


def _manifest(config: VAETrainConfig, workdir: epath.Path) -> str:
  data = config.data
  if data.path:
    return data.path
  folder = workdir / "data" / "clips"
  sizes, durations = data.sizes, data.durations
  return str(
    shapes.render_dataset(
      folder, data.clips, config.seed, sizes=sizes, durations=durations, fps=data.fps
    )
  )


def _export(config: VAETrainConfig, workdir: epath.Path, model: VAE, clips: Clips) -> None:
  factor = round(measure_scaling_factor(model, clips, config.train.frames), 6)
  vae_config = dataclasses.replace(config.model, scaling_factor=factor)
  params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  diffusers.save_vae(workdir / "vae", vae_config, params)
  tqdm.write(f"{workdir / 'vae'}: the VAE, scaling factor {factor}")
