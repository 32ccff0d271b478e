"""`inspect` tells what is in a dataset, and which rows a training reads, by the training's code."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from commands import run_command
from drawn import VAE_CONFIG, draw
from etils import epath
from flax import nnx
from PIL import Image
from small_run import config_flags_of, make_config, make_inputs, settings

from cogvideox_jax.config.read import to_json
from cogvideox_jax.conversion import diffusers
from cogvideox_jax.data import mixture
from cogvideox_jax.errors import UserError
from cogvideox_jax.models import vae
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.training import dataset_report, stage_data

CLIPS = 48


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  return make_inputs(tmp_path_factory.mktemp("inputs"))


def flags_of(inputs, **changes):
  return ["--config=configs/tiny.py", *config_flags_of(settings(inputs, **changes))]


def last_object(result):
  assert result.code == 0, result.errors
  return json.loads(result.output.splitlines()[-1])


def test_listed_rows_are_those_that_training_reads(inputs, tmp_path):
  config = make_config(inputs)
  datasets = stage_data.open_data(config, "tiny", epath.Path(tmp_path))
  rows = stage_data.make_rows(config, "tiny", datasets, "train", "zeros")
  loader = stage_data.make_loader(
    config, "tiny", rows, mixture.begin(stage_data.weights(config, "tiny"))
  )
  expected = []
  for index in range(3, 45):
    name, row = loader.row(index)
    clips = [datasets[name].source(clip) for clip in row.clips.tolist()]
    expected.append({"row": index, "epoch": row.epoch, "host": index % 8 // 2, "clips": clips})
  assert {row["epoch"] for row in expected} >= {0, 1}

  listing = ["--rows=3:45", "--hosts=4", "--json"]
  told = run_command(tmp_path, "inspect", str(inputs / "data"), *flags_of(inputs), *listing)
  assert last_object(told) == {"rows": expected}


@pytest.mark.parametrize("hosts", [1, 2, 8])
def test_hosts_share_the_same_rows(inputs, hosts):
  config = make_config(inputs)
  (dataset,) = dataset_report.open_stages(epath.Path(inputs) / "data").values()
  rows = dataset_report.training_rows(config, "tiny", dataset)
  listed = dataset_report.list_rows(config, "tiny", rows, range(20), hosts)
  assert [row["row"] for row in listed] == list(range(20))
  assert [row["host"] for row in listed] == [index % 8 * hosts // 8 for index in range(20)]
  alone = dataset_report.list_rows(config, "tiny", rows, range(20), 1)
  assert [row["clips"] for row in listed] == [row["clips"] for row in alone]


def test_a_table_and_two_pictures_of_a_dataset(inputs, tmp_path):
  args = ["--model=", f"--output={tmp_path}/pictures", "--json"]
  result = run_command(tmp_path, "inspect", str(inputs / "data" / "tiny"), *flags_of(inputs), *args)
  found = last_object(result)["stages"]["tiny"]
  assert (found["clips"], found["images"]) == (CLIPS, CLIPS // 4)
  assert found["hours"] == pytest.approx(12 * (5 + 9 + 9) / 8 / 3600)
  assert found["resolutions"] == {"16x16": 24, "16x24": 12, "24x16": 12}
  assert found["durations"] == {"1": 12, "5": 12, "9": 24}
  packing = found["packing"]
  assert packing["unpackable"] == 0
  assert packing["padding_fraction"] == pytest.approx(1 - packing["tokens"] / packing["rows"] / 48)
  for word in ("48 clips", "16x24", "padding", "wrote"):
    assert word in result.output
  for name in ("clips", "packing"):
    picture = np.asarray(Image.open(tmp_path / "pictures" / "tiny" / f"{name}.png"))
    assert picture.std() > 10


def test_clips_are_shown_decoded_by_the_vae_they_were_encoded_with(inputs, tmp_path):
  (dataset,) = dataset_report.open_stages(epath.Path(inputs) / "data").values()
  alike = np.flatnonzero((dataset.index.latent_shape == (3, 4, 4, 4)).all(axis=1))[:2]
  frames = [dataset[clip].mean[0] for clip in alike.tolist()]
  config, params = draw(VAE, VAE_CONFIG)
  diffusers.save_vae(tmp_path / "vae", config, params)
  shown = dataset_report.decode_first_frames(frames, str(tmp_path))
  network = nnx.merge(graph_of(VAE, config), params)
  for image, latents in zip(shown, frames, strict=True):
    decoded = vae.decode(network, jnp.float32(latents)[None, None])[0, 0]
    np.testing.assert_allclose(image, np.clip(127.5 * decoded + 127.5, 0, 255), atol=0.51)
  with pytest.raises(UserError, match="has 4 latent channels, the clips have 3"):
    dataset_report.decode_first_frames([frame[..., :3] for frame in frames], str(tmp_path))


def test_a_dataset_is_shown_with_the_config_kept_beside_it_or_with_none(inputs, tmp_path):
  shutil.copytree(inputs / "data", tmp_path / "data")
  bare = last_object(run_command(tmp_path, "inspect", str(tmp_path / "data"), "--json"))
  assert bare["stages"]["tiny"]["clips"] == CLIPS
  assert bare["stages"]["tiny"]["packing"] is None
  assert (tmp_path / "data" / "tiny" / "clips.png").exists()

  (tmp_path / "data" / "tiny" / "config.json").write_text('{"of": "another program"}')
  kept = make_config(inputs, components="")
  (tmp_path / "data" / "config.json").write_text(to_json(kept))
  told = last_object(run_command(tmp_path, "inspect", str(tmp_path / "data"), "--json"))
  assert told["stages"]["tiny"]["packing"]["row_tokens"] == kept.stages["tiny"].row_tokens


@pytest.mark.parametrize(
  ("args", "words"),
  [
    ([], ["DATASET"]),
    (["nowhere"], ["nowhere", "encode"]),
    (["{data}", "--rows=0:4"], ["--config=FILE"]),
    (["{data}", "--rows=4:4", "{config}"], ["--rows=4:4", "START:STOP"]),
    (["{data}", "--rows=a:4", "{config}"], ["--rows=a:4", "START:STOP"]),
    (["{data}", "--rows=0:4", "--hosts=3", "{config}"], ["8 rows", "3 hosts"]),
    (["{data}", "--hosts=0", "{config}"], ["--hosts=0"]),
    (["{data}", "other", "{config}"], ["Not a flag: other"]),
    (["{data}", "{config}", "--config.seeed=1"], ["--config.seeed", "seed"]),
    (["{data}", "{config}", "--config.model.text_width=16"], ["text states"]),
    (["{data}", "{config}", "--model=nowhere"], ["nowhere"]),
  ],
  ids=str,
)
def test_mistakes_are_told_in_a_few_lines(inputs, tmp_path, args, words):
  filled = []
  for arg in args:
    filled += flags_of(inputs) if arg == "{config}" else [arg.format(data=inputs / "data")]
  result = run_command(tmp_path, "inspect", *filled)
  assert result.code == 2, result.errors
  assert len(result.errors.splitlines()) <= 8, result.errors
  for word in words:
    assert word in result.errors


def test_rows_of_several_stages_must_be_asked_for_one_by_one(inputs, tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError, match="holds no encoded dataset"):
    dataset_report.open_stages(epath.Path(tmp_path / "empty"))
  config = make_config(inputs)
  assert dataset_report.readers(config, ["tiny", "other"], "") == {"tiny": "tiny"}
  assert dataset_report.readers(config, ["other"], "") == {"other": "tiny"}
  assert dataset_report.readers(config, ["tiny", "other"], "tiny") == {"tiny": "tiny"}
  with pytest.raises(UserError, match=r"--stage=stage9: config\.stages has tiny"):
    dataset_report.readers(config, ["tiny"], "stage9")
  with pytest.raises(UserError, match="--stage=tiny reads tiny, but here there are a, b"):
    dataset_report.readers(config, ["a", "b"], "tiny")
