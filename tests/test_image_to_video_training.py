"""Image to video from files to samples: encoded, trained and sampled as the published kinds."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from drawn import DIT_CONFIG, VAE_CONFIG, draw
from etils import epath
from flax import nnx
from model_folder import make_model
from PIL import Image
from small_run import make_config as make_text_config
from small_run import make_inputs
from typed_config import typed

from cogvideox_jax import sample
from cogvideox_jax.config import checks
from cogvideox_jax.data import video
from cogvideox_jax.data.mp4 import write_mp4
from cogvideox_jax.data.noising import ImageNoise, noised_copies
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference.image_to_video import ImageToVideo
from cogvideox_jax.models import vae
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.precompute import encode_clips
from cogvideox_jax.training import stage_data, transformer_run, workdir
from cogvideox_jax.training.stages import Stage
from configs import tiny_i2v

CLIPS = 20
KINDS = {  # What sets the published models apart; one has previews, one is validated.
  "5b_i2v": {"model.learned_positions": True, "model.positions": "rope", "validation.every": 0},
  "1_5_5b_i2v": {"model.patch": (2, 2, 2), "model.ofs_width": 8, "preview.every": 0},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  """FOLDER/model, FOLDER/clips of noise, and an image."""
  folder = epath.Path(tmp_path_factory.mktemp("inputs"))
  make_model(folder / "model")
  rng = np.random.default_rng(0)
  (folder / "clips").mkdir()
  lines = []
  for number in range(CLIPS):
    frames = rng.integers(0, 256, (9, 16, 24, 3), np.uint8)
    write_mp4(folder / "clips" / f"{number}.mp4", frames, 8.0)
    lines.append({"file": f"{number}.mp4", "captions": [f"clip {number}", "another caption"]})
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "clips" / "manifest.jsonl").write_text(text)
  Image.fromarray(frames[0]).save(folder / "image.png")
  return folder


def make_config(inputs, **changes):
  """The tiny config for the drawn model, whose VAE compresses 4 times in space."""
  model = {f"model.{name}": value for name, value in dataclasses.asdict(DIT_CONFIG).items()}
  changes = (
    model
    | {
      "components": str(inputs / "model"),
      "model.in_channels": 2 * DIT_CONFIG.out_channels,
      "image.draws": 2,
      "image.scale": "raw",
      "data.validation_fraction": 0.3,
      "stages.tiny.sizes": ((16, 24),),
      "stages.tiny.durations": (9,),
      "stages.tiny.row_tokens": 48,
      "stages.tiny.max_clips": 2,
      "train.steps": 3,
      "log_every": 1,
      "optimizer.warmup_steps": 1,
      "optimizer.ema_decay": 0.5,
      "validation.every": 3,
      "validation.batches": 1,
      "preview.every": 3,
      "preview.prompts": ("a clip",),
      "preview.images": (str(inputs / "image.png"),),
      "preview.num_frames": 9,
      "preview.height": 16,
      "preview.width": 24,
      "preview.steps": 2,
    }
    | changes
  )
  return typed(tiny_i2v.get_config(), **changes)


@pytest.fixture(scope="module")
def encoded(inputs, tmp_path_factory):
  output = epath.Path(tmp_path_factory.mktemp("encoded"))
  config = make_config(inputs)
  counts = encode_clips.encode(config, inputs / "clips", output, config.components, workers=1)
  assert counts == (20, 0)
  return output


def test_encoded_images_are_those_of_noised_first_frames(inputs, encoded):
  dataset = Dataset(encoded / "tiny")
  example = dataset[7]
  assert dataset.index.images.tolist() == [2] * CLIPS
  first = video.read(inputs / "clips" / example.source, fps=8.0, num_frames=1, height=16, width=24)[
    0
  ]
  image = make_config(inputs).image
  noise = ImageNoise(2, image.log_sigma_mean, image.log_sigma_std, seed=0)
  network = nnx.merge(graph_of(vae.VAE, VAE_CONFIG), draw(vae.VAE, VAE_CONFIG)[1])
  for frame, stored in zip(noised_copies(first, example.source, noise), example.image, strict=True):
    moments = vae.encode(network, jnp.asarray(frame)[None, None])
    np.testing.assert_allclose(stored, np.concatenate(moments, axis=1)[0], atol=2e-2)  # float16.
  assert not np.array_equal(example.image[0], example.image[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_sees_an_image_trains_and_its_workdir_is_sampled_from(
  kind, inputs, encoded, tmp_path
):
  config = make_config(inputs, **KINDS[kind], **{"data.path": str(encoded)})
  checks.check(config, config.components)
  folder = epath.Path(tmp_path) / "run"
  assert transformer_run.train(config, folder) == 0
  logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  measured = ["loss", "validation_loss"] if config.validation.every else ["loss"]
  assert np.isfinite([logged[-1][name] for name in measured]).all()
  if config.preview.every:
    assert video.probe(folder / "previews" / "step_000003.mp4").num_frames == 9

  pipe = workdir.load(folder, kind=ImageToVideo)
  assert pipe.settings.image_scale == config.image.scale == "raw"
  flags.FLAGS.mark_as_parsed()
  output = str(tmp_path / "video.mp4")
  with flagsaver.flagsaver(
    model=str(folder), prompt="a clip", image=str(inputs / "image.png"), output=output, steps=2
  ):
    sample.main()
  info = video.probe(output)
  assert (info.num_frames, info.height, info.width) == (9, 16, 24)


def test_it_is_said_when_a_stage_sees_the_noise_of_a_first_frame_twice(inputs, encoded):
  config = make_config(inputs, **{"data.path": str(encoded)})
  datasets = stage_data.open_data(config, "tiny", encoded)
  rows = stage_data.make_rows(config, "tiny", datasets, "train", "zeros")
  epoch = rows["tiny"].per_epoch
  assert config.stages["tiny"].rows == 8

  def said(steps):
    return stage_data.repeated_noise(config, Stage("tiny", 10, 10 + steps), rows)

  assert said(2 * epoch // 8) == []
  (line,) = said(3 * epoch)
  assert "24.0 times" in line and "2 noised copies" in line and "--config.image.draws" in line


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model__in_channels": 8}, "encoded without their first frames"),
    ({"model__learned_positions": True}, r"learned positions, which fix them to \(5, 8, 8\)"),
    ({"model__in_channels": 16, "model__out_channels": 16}, "latent channels 4, but .* says 16"),
  ],
)
def test_clips_that_do_not_suit_the_model_are_refused_before_any_step(tmp_path, change, message):
  config = make_text_config(make_inputs(epath.Path(tmp_path)), **change)
  with pytest.raises(UserError, match=message):
    transformer_run.train(config, epath.Path(tmp_path) / "run")
