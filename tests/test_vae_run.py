"""The VAE's training in a workdir: that it learns, that it resumes, what it leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import VAE_CONFIG, draw
from etils import epath
from flax import nnx
from stopped_runs import digests, lines, train_and_stop
from typed_config import typed

from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.conversion import diffusers
from cogvideox_jax.data import buckets, measured_clips, video
from cogvideox_jax.data.clip_batches import ClipBatches
from cogvideox_jax.data.decoding import Decoders
from cogvideox_jax.data.mp4 import write_mp4
from cogvideox_jax.errors import UserError
from cogvideox_jax.models import vae
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.models.vae_config import VAEConfig
from cogvideox_jax.training import checkpoint, vae_run
from cogvideox_jax.training.vae_export import measure_scaling_factor
from configs import vae_tiny


def make_config(**changes):
  config = vae_tiny.get_config()
  config.model.update(channels=(8,), temporal_compression=1, latent_channels=4, groups=2)
  config.data.update(clips=16, sizes=((16, 16),), durations=(1,), validation_fraction=0.4)
  config.train.update(steps=6, frames=4, batch_multiple=8)
  config.optimizer.warmup_steps = 2
  config.checkpoint.every = 3
  config.log_every = 1
  config.preview.every = 6
  config.validation.every = 3
  config.mesh.update(data=8, fsdp=1)
  return typed(config, VAETrainConfig, **changes)


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_bits_and_refuses_other_configs_and_clips(tmp_path):
  config = make_config()
  assert vae_run.train(config, epath.Path(tmp_path / "whole")) == 0
  workdir = epath.Path(tmp_path / "stopped")
  train_and_stop(vae_run.train, config, workdir, at=2)
  assert not (workdir / "vae").exists()
  assert vae_run.train(config, workdir) == 0
  assert digests(workdir)[6] == digests(tmp_path / "whole")[6]
  resumed = [e["step"] for e in lines(workdir / "events.jsonl") if e["event"] == "resumed"]
  assert resumed == [0, 2]
  assert (workdir / "previews" / "step_000006.png").exists()
  logged = lines(workdir / "metrics.jsonl")
  assert [line["step"] for line in logged if "validation_psnr" in line] == [3, 6]
  assert [line["epoch"] for line in logged] == [0, 1, 2, 3, 4, 5]  # Each is one batch of 8 clips.

  with pytest.raises(UserError, match=r"config\.loss\.kl: was 0\.0001, is 1\.0"):
    vae_run.train(make_config(loss__kl=1.0), workdir)
  for path in sorted((workdir / "data" / "clips").glob("*.png"))[:12]:
    path.unlink()
  with pytest.raises(UserError, match="the records of 'clips' are not the same"):
    vae_run.train(config, workdir)


def test_few_clips_train_without_validation_and_leave_the_scaling_factor_of_the_average(
  tmp_path, capsys
):
  config = make_config(data__validation_fraction=1e-6, preview__every=0, train__steps=3)
  workdir = epath.Path(tmp_path)
  assert vae_run.train(config, workdir) == 0
  assert "None of the 16 clips is held out" in capsys.readouterr().out
  assert not any("validation_psnr" in line for line in lines(workdir / "metrics.jsonl"))
  vae_config, params = diffusers.load_vae(workdir / "vae")
  frames = [
    video.read(path, fps=8.0, num_frames=1, height=16, width=16)
    for path in sorted((workdir / "data" / "clips").glob("*.png"))
  ]
  measured = measure_scaling_factor(vae_config, params, [jnp.asarray(np.stack(frames))])
  assert vae_config.scaling_factor == pytest.approx(measured, rel=1e-4)


@pytest.mark.slow
def test_a_training_that_diverges_ends_in_a_message_and_keeps_its_finite_checkpoint(tmp_path):
  config = make_config(
    optimizer__learning_rate=1e18,
    optimizer__warmup_steps=0,
    checkpoint__every=1,
    checkpoint__keep=2,
    log_every=4,
    validation__every=0,
    preview__every=0,
  )
  workdir = epath.Path(tmp_path)
  with pytest.raises(UserError, match=r"at step 2: .*not finite. Earlier .* are intact"):
    vae_run.train(config, workdir)
  assert checkpoint.good_steps(workdir / "checkpoints") == [1]
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(checkpoint.load_weights(workdir, "raw")))


def test_a_batch_that_does_not_divide_over_the_devices_is_refused_with_the_way_out(tmp_path):
  config = make_config(train__batch_multiple=1)
  with pytest.raises(UserError, match=r"4 clips .* 8 devices(.|\n)*config.train.batch_multiple=8"):
    vae_run.train(config, epath.Path(tmp_path))


def test_scaled_latents_have_unit_variance(tmp_path):
  model = nnx.merge(graph_of(VAE, VAE_CONFIG), params := draw(VAE, VAE_CONFIG)[1])
  for index in range(8):
    frames = np.random.default_rng(index).integers(0, 255, (1, 16, 16, 3), np.uint8)
    write_mp4(tmp_path / f"{index}.mp4", frames, 8.0)
    (tmp_path / f"{index}.txt").write_text("noise")
  with Decoders(1) as decoders:
    clips = measured_clips.measure(str(tmp_path), ((16, 16),), (1,), 8.0, decoders)
    frames = ClipBatches(clips, decoders, frames=8, seed=0).batch(0)
  factor = measure_scaling_factor(VAE_CONFIG, params, [jnp.asarray(frames)])
  mean, logvar = vae.encode(model, jnp.float32(frames) / 127.5 - 1)
  noise = jax.random.normal(jax.random.key(0), (64, *mean.shape))
  latents = factor * (mean + jnp.exp(logvar / 2) * noise)
  assert float(latents.std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
  ("key", "value", "word"),
  [("durations", (16,), "16"), ("sizes", ((15, 16),), "15"), ("fps", -1.0, "fps")],
)
def test_clips_that_the_vae_cannot_take_are_refused_at_once(tmp_path, key, value, word):
  config = make_config(model__channels=(8, 8), **{f"data__{key}": value})
  with pytest.raises(UserError, match=word):
    vae_run.train(config, epath.Path(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("compression", "channels", "durations", "near"),
  [
    (4, (8, 8, 8), (1, 5), "5 frames gives 2 .* to 8 frames.*\nUse 1 or 9"),
    (4, (8, 8, 8), (17, 13), "13 frames gives 4 .* to 16 frames.*\nUse 9 or 17"),
    (8, (8, 8, 8, 8), (25,), "25 frames gives 4 .* to 32 frames.*\nUse 17 or 33"),
    (8, (8, 8, 8, 8), (9,), "9 frames gives 2 .* to 16 frames.*\nUse 1 or 17"),
  ],
)
def test_durations_that_would_be_decoded_to_more_frames_are_refused_with_the_nearest(
  tmp_path, compression, channels, durations, near
):
  config = make_config(
    model__channels=channels,
    model__temporal_compression=compression,
    data__durations=durations,
  )
  with pytest.raises(UserError, match=near):
    vae_run.train(config, epath.Path(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("compression", [2, 4, 8])
def test_durations_are_good_where_the_vae_gives_back_as_many_frames(compression):
  config = VAEConfig(3, (2,) * 4, 2, 0, 1, compression)
  model = nnx.merge(graph_of(VAE, config), draw(VAE, config)[1])
  for frames in (5, 9, 17, 25):
    video = jax.ShapeDtypeStruct((1, frames, 8, 8, 3), jnp.float32)
    restored = jax.eval_shape(lambda x: vae.decode(model, vae.encode(model, x)[0]), video)
    try:
      buckets.check_restored((frames,), compression)
    except UserError:
      assert restored.shape[1] != frames
    else:
      assert restored.shape[1] == frames


def test_a_folder_without_usable_clips_is_refused(tmp_path):
  folder = tmp_path / "clips"
  folder.mkdir()
  (folder / "a.mp4").write_bytes(b"")
  (folder / "a.txt").write_text("nothing")
  config = make_config(data__path=str(folder))
  with pytest.raises(UserError, match="No clip of"):
    vae_run.train(config, epath.Path(tmp_path / "run"))
