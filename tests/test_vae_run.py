"""The VAE's training: what its loss is, that it learns, that it resumes, what it leaves."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import VAE_CONFIG, draw
from etils import epath
from flax import nnx
from typed_config import typed

from cogvideox_jax.config.schema import VAETrainConfig
from cogvideox_jax.conversion import diffusers
from cogvideox_jax.data import video
from cogvideox_jax.errors import UserError
from cogvideox_jax.models import vae
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.training import vae_run
from cogvideox_jax.training.vae_step import (
  LossWeights,
  measure_scaling_factor,
  read_clips,
  vae_loss,
)
from configs import vae_tiny


@pytest.fixture
def config():
  return make_config()


def make_config(**changes):
  config = vae_tiny.get_config()
  config.model.update(channels=(8, 8), temporal_compression=2, latent_channels=4, groups=2)
  config.data.update(clips=16, sizes=((16, 16),), durations=(1,))
  config.train.update(steps=6, frames=4)
  config.optimizer.warmup_steps = 2
  config.checkpoint.every = 3
  config.log_every = 1
  config.preview.every = 6
  return typed(config, VAETrainConfig, **changes)


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def digests(workdir):
  events = lines(workdir / "events.jsonl")
  return {e["step"]: e["digest"] for e in events if e["event"] == "checkpoint_saved"}


def test_the_loss_is_the_weighted_sum_of_its_parts():
  model = nnx.merge(graph_of(VAE, VAE_CONFIG), draw(VAE, VAE_CONFIG)[1])
  frames = jax.random.uniform(jax.random.key(0), (2, 1, 8, 8, 3), minval=-1)
  loss, parts = vae_loss(model, frames, jax.random.key(1), LossWeights(l1=0.5, l2=2.0, kl=0.1))
  mse = 4 / 10 ** (parts["psnr"] / 10)
  np.testing.assert_allclose(loss, 0.5 * parts["l1"] + 2 * mse + 0.1 * parts["kl"], rtol=1e-5)
  mean, logvar = vae.encode(model, frames)
  from_normal = 0.5 * np.mean(mean**2 + np.exp(logvar) - 1 - logvar)
  np.testing.assert_allclose(parts["kl"], from_normal, rtol=1e-5)


def test_a_stopped_run_ends_with_the_same_bits_and_refuses_another_config(tmp_path, config):
  assert vae_run.train(config, epath.Path(tmp_path / "whole")) == 0
  workdir = epath.Path(tmp_path / "stopped")
  real = vae_run.Interrupts

  class StopsAtOnce(real):
    def __enter__(self):
      self.exit_code = 130
      return self

  vae_run.Interrupts = StopsAtOnce
  try:
    assert vae_run.train(config, workdir) == 130
  finally:
    vae_run.Interrupts = real
  assert not (workdir / "vae").exists()
  assert vae_run.train(config, workdir) == 0
  assert digests(workdir)[6] == digests(tmp_path / "whole")[6]
  resumed = [e["step"] for e in lines(workdir / "events.jsonl") if e["event"] == "resumed"]
  assert resumed == [0, 1]
  assert (workdir / "previews" / "step_000006.png").exists()

  with pytest.raises(UserError, match=r"config\.loss\.kl: was 0\.0001, is 1\.0"):
    vae_run.train(make_config(loss__kl=1.0), workdir)

  vae_config, params = diffusers.load_vae(workdir / "vae")
  model = nnx.merge(graph_of(VAE, vae_config), jax.tree.map(jnp.asarray, params))
  clips = read_clips(str(workdir / "data" / "clips"), config.data)
  measured = measure_scaling_factor(model, clips, 4)
  assert vae_config.scaling_factor == pytest.approx(measured, rel=1e-4)


def test_scaled_latents_have_unit_variance(config, tmp_path):
  model = nnx.merge(graph_of(VAE, VAE_CONFIG), draw(VAE, VAE_CONFIG)[1])
  for index in range(8):
    frames = np.random.default_rng(index).integers(0, 255, (1, 16, 16, 3), np.uint8)
    video.write_mp4(tmp_path / f"{index}.mp4", frames, 8.0)
    (tmp_path / f"{index}.txt").write_text("noise")
  clips = read_clips(str(tmp_path), config.data)
  factor = measure_scaling_factor(model, clips, 8)
  (frames,) = clips.by_bucket.values()
  mean, logvar = vae.encode(model, jnp.float32(frames) / 127.5 - 1)
  noise = jax.random.normal(jax.random.key(0), (64, *mean.shape))
  latents = factor * (mean + jnp.exp(logvar / 2) * noise)
  assert float(latents.std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
  ("key", "value", "word"),
  [("durations", (16,), "16"), ("sizes", ((15, 16),), "15"), ("fps", -1.0, "fps")],
)
def test_clips_that_the_vae_cannot_take_are_refused_at_once(tmp_path, key, value, word):
  config = make_config(**{f"data__{key}": value})
  with pytest.raises(UserError, match=word):
    vae_run.train(config, epath.Path(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_folder_without_usable_clips_is_refused(tmp_path, config):
  (tmp_path / "a.mp4").write_bytes(b"")
  (tmp_path / "a.txt").write_text("nothing")
  with pytest.raises(UserError, match="No clip of"):
    read_clips(str(tmp_path), config.data)
