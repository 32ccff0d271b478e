"""From real files to an encoded dataset, with clips that cannot be used."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import T5_CONFIG, draw
from flax import nnx
from safetensors.numpy import load_file, save_file
from small_encodings import TOKENIZER, encode, make_encoders, small_config, sources, write_clips
from typed_config import typed

from cogvideox_jax.conversion import component_digests
from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.data import video
from cogvideox_jax.data.buckets import Bucket
from cogvideox_jax.data.dataset_index import damaged_files
from cogvideox_jax.data.mp4 import write_mp4
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.errors import UserError
from cogvideox_jax.frozen_networks import FrozenNetworks, fill
from cogvideox_jax.models import vae
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.t5 import T5Encoder, encode_text
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.precompute import encode_clips

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return make_encoders(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config():
  return small_config()


def test_an_example_holds_the_moments_of_its_clip_and_the_states_of_its_caption(
  tmp_path, model, config
):
  clips = write_clips(tmp_path / "clips", 3)
  encode(typed(config), clips, tmp_path / "out", model)
  dataset = Dataset(tmp_path / "out" / "tiny")
  examples = [dataset[index] for index in range(len(dataset))]
  example = next(example for example in examples if example.caption == "number 1")
  frames = video.read(clips / "001.mp4", fps=8.0, num_frames=9, height=16, width=16)

  vae_config, params = open_model(model).vae()
  network = nnx.merge(graph_of(VAE, vae_config), params)
  mean, logvar = vae.encode(network, jnp.float32(frames[None]) / 127.5 - 1)
  np.testing.assert_allclose(example.mean, mean[0], atol=2e-2)  # Stored as float16.
  np.testing.assert_allclose(example.logvar, logvar[0], atol=2e-2)
  assert (example.num_frames, example.height, example.width, example.fps) == (9, 16, 16, 8.0)
  assert dataset.encoded_by == component_digests.describe(open_model(model), model, "zeros", 8.0)
  assert all(dataset.encoded_by.networks) and damaged_files(tmp_path / "out" / "tiny") == []
  assert "encoded_by.json" in (tmp_path / "out" / "tiny" / "sha256sums.txt").read_text()

  graph = graph_of(T5Encoder, T5_CONFIG)
  ids = Tokenizer(TOKENIZER).encode(["number 1"], 6)
  states = encode_text(draw(T5Encoder, T5_CONFIG)[1], ids, graphdef=graph)
  np.testing.assert_allclose(np.float32(example.text), states[0], atol=2e-2)


def test_clips_that_cannot_be_used_get_their_line_and_the_rest_is_encoded(tmp_path, model, config):
  clips = write_clips(tmp_path / "clips", 4)
  (clips / "empty.mp4").write_bytes(b"")
  (clips / "torn.mp4").write_bytes((clips / "001.mp4").read_bytes()[:300])
  with (clips / "manifest.jsonl").open("a") as manifest:
    manifest.write('{"file": "empty.mp4", "caption": "nothing"}\n')
    manifest.write('{"file": "torn.mp4", "caption": "torn"}\n')
    manifest.write('{"file": "absent.mp4", "caption": "absent"}\n')
    manifest.write('{"file": "../outside.mp4", "caption": "outside"}\n')
    manifest.write('{"file": "000.mp4"}\n')
    manifest.write("not json\n")
  counts = encode(typed(config), clips, tmp_path / "out", model)
  lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
  refused = [json.loads(line) for line in lines]
  assert counts == (4, 6)
  assert sorted(line["line"] for line in refused) == [5, 6, 7, 8, 9, 10]
  assert all(line["reason"] for line in refused)
  assert all(line.keys() == {"file", "line", "reason"} for line in refused)


def test_a_clip_shorter_than_every_duration_is_refused_with_the_reason(tmp_path, model, config):
  config.stages.tiny.durations = (9,)
  clips = write_clips(tmp_path / "clips", 2)
  encode(typed(config), clips, tmp_path / "out", model)
  (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
  assert "9 frames at 8 frames a second" in json.loads(line)["reason"]


def test_encoding_again_does_nothing_and_keeps_the_quarantine(tmp_path, model, config):
  clips = write_clips(tmp_path / "clips", 3)
  (clips / "002.mp4").write_bytes(b"x")
  encode(typed(config), clips, tmp_path / "out", model)
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.array_record*")}
  quarantine = (tmp_path / "out" / "quarantine.jsonl").read_text()
  counts = encode(typed(config), clips, tmp_path / "out", model)
  assert counts == (2, 1)
  assert (tmp_path / "out" / "quarantine.jsonl").read_text() == quarantine
  for path, time_of in before.items():
    assert path.stat().st_mtime_ns == time_of


def test_another_manifest_into_the_same_place_is_refused(tmp_path, model, config):
  encode(typed(config), write_clips(tmp_path / "one", 2), tmp_path / "out", model)
  other = write_clips(tmp_path / "two", 3)
  with pytest.raises(UserError, match="other files or settings"):
    encode(typed(config), other, tmp_path / "out", model)


def test_an_output_that_belongs_to_another_dataset_is_refused_before_a_model_is_read(
  tmp_path, model, config, monkeypatch
):
  """Also the output of a version that recorded less, whose numbers of shards differ."""
  clips = write_clips(tmp_path / "clips", 2)
  encode_clips.encode(typed(config), clips, tmp_path / "out", model)

  def refuse(*_):
    raise AssertionError("the model is read")

  monkeypatch.setattr(encode_clips, "FrozenNetworks", refuse)
  with monkeypatch.context() as patch:
    patch.setattr(encode_clips.component_digests, "describe", refuse)
    other = write_clips(tmp_path / "two", 3)
    for change in ({"data__fps": 4.0}, {"stages__tiny__durations": (1, 5)}):
      with pytest.raises(UserError, match="other files or settings"):
        encode_clips.encode(typed(config, **change), clips, tmp_path / "out", model)
    with pytest.raises(UserError, match="other files or settings"):
      encode_clips.encode(typed(config), other, tmp_path / "out", model)
    plan = tmp_path / "out" / "tiny" / "shards.json"
    fields = json.loads(plan.read_text())
    del fields["settings"]
    plan.write_text(json.dumps(fields))
    patch.setattr(encode_clips, "SHARD_ITEMS", 1)
    with pytest.raises(UserError, match="other files or settings"):
      encode_clips.encode(typed(config), clips, tmp_path / "out", model)
  changed = shutil.copytree(model, tmp_path / "changed")
  stored = load_file(changed / "vae" / "diffusion_pytorch_model.safetensors")
  name = next(iter(stored))
  save_file(
    {**stored, name: stored[name] + 1}, changed / "vae" / "diffusion_pytorch_model.safetensors"
  )
  with pytest.raises(UserError, match="other files or settings"):
    encode_clips.encode(typed(config), clips, tmp_path / "out", str(changed))
  monkeypatch.undo()
  assert encode_clips.encode(typed(config), clips, tmp_path / "out", model).clips


def two_stages(config):
  with config.unlocked():
    config.stages = {"a": config.stages.tiny.copy_and_resolve_references(), "b": config.stages.tiny}
  config.stages.b.sizes = ((32, 32),)
  return config


def test_a_long_video_becomes_clips_that_share_its_caption_and_follow_one_another(
  tmp_path, model, config
):
  clips, output = write_clips(tmp_path / "clips", 1), tmp_path / "out"
  frames = np.random.default_rng(1).integers(0, 255, (30, 16, 16, 3), np.uint8)
  write_mp4(clips / "000.mp4", frames, 8.0)
  assert encode(typed(config), clips, output, model) == (3, 0)
  dataset = Dataset(output / "tiny")
  assert sources(output) == ["000.mp4#0", "000.mp4#1", "000.mp4#2"]
  assert len(set(dataset.index.source_hash)) == 1
  shown = video.read(clips / "000.mp4", fps=8.0, num_frames=27, height=16, width=16)
  networks = FrozenNetworks(open_model(model), typed(config))
  cut = shown.reshape(3, 9, 16, 16, 3)
  mean, _ = networks.moments(fill(cut, networks.batch_size(Bucket(9, 16, 16))))
  for clip in range(3):
    assert dataset[clip].caption == "number 0"
    np.testing.assert_allclose(dataset[clip].mean, mean[clip], atol=2e-2)


def test_a_file_goes_to_each_stage_at_its_size_unless_it_would_blur(tmp_path, model, config):
  clips, output = write_clips(tmp_path / "clips", 3), tmp_path / "out"
  large = np.random.default_rng(1).integers(0, 255, (9, 32, 32, 3), np.uint8)
  write_mp4(clips / "001.mp4", large, 8.0)
  (clips / "002.mp4").write_bytes(b"x")
  assert encode(typed(two_stages(config)), clips, output, model) == (3, 2)
  a, b = Dataset(output / "a"), Dataset(output / "b")
  assert sorted(a.source(clip) for clip in range(len(a))) == ["000.mp4", "001.mp4"]
  assert [b.source(clip) for clip in range(len(b))] == ["001.mp4"]
  assert (set(a.index.height), set(b.index.height)) == ({16}, {32})
  small, torn = map(json.loads, (output / "quarantine.jsonl").read_text().splitlines())
  assert (small["file"], torn["file"]) == ("000.mp4", "002.mp4")
  assert small["reason"].startswith("stage b: 16x16 (height x width) pixels would be enlarged 2.0")
  assert "stage" not in torn["reason"]  # Once, for both.


def test_a_stage_that_is_there_is_not_written_again(tmp_path, model, config):
  clips, output = write_clips(tmp_path / "clips", 2), tmp_path / "out"
  config.stages.tiny.sizes = ((16, 16), (16, 32))
  encode(typed(two_stages(config)), clips, output, model)
  shards = {stage: next(output.glob(f"{stage}/*.array_record*")) for stage in "ab"}
  expected = shards["b"].read_bytes()
  shards["b"].unlink()
  before = shards["a"].stat().st_mtime_ns
  encode(typed(config), clips, output, model)
  assert shards["b"].read_bytes() == expected
  assert shards["a"].stat().st_mtime_ns == before


def test_a_clip_keeps_all_its_captions_and_its_score(tmp_path, model, config):
  clips, output = write_clips(tmp_path / "clips", 2), tmp_path / "out"
  line = {"file": "000.mp4", "caption": "first", "captions": ["second", "number 1"], "score": 0.5}
  manifest = clips / "manifest.jsonl"
  manifest.write_text(f"{json.dumps(line)}\n{manifest.read_text().splitlines()[1]}\n")
  encode(typed(config), clips, output, model)
  dataset = Dataset(output / "tiny")
  several, one = np.argsort(-dataset.index.captions).tolist()
  np.testing.assert_array_equal(dataset.index.captions[[several, one]], [3, 1])
  np.testing.assert_array_equal(dataset.index.score[[several, one]], [0.5, np.nan])
  used = [dataset[several].with_caption(number) for number in range(3)]
  assert [example.caption for example in used] == ["first", "second", "number 1"]
  np.testing.assert_array_equal(used[2].text, dataset[one].text)


def test_the_number_of_processes_changes_nothing(tmp_path, model, config, monkeypatch):
  monkeypatch.setattr(encode_clips, "SHARD_ITEMS", 5)
  clips = write_clips(tmp_path / "clips", 12)
  (clips / "007.mp4").write_bytes(b"x")
  written = []
  for workers in (1, 3):
    output = tmp_path / str(workers)
    encode(typed(config), clips, output, model, workers=workers)
    files = [path for path in output.rglob("*") if path.is_file()]
    written.append({path.relative_to(output): path.read_bytes() for path in files})
  assert written[0] == written[1]


def test_the_text_encoder_runs_as_one_program_whatever_the_number_of_captions(model, config):
  networks = FrozenNetworks(open_model(model), typed(config))
  before = encode_text._cache_size()
  one = networks.text(["a clip"])
  three = networks.text(["another", "a clip", "one more"])
  assert encode_text._cache_size() - before <= 1
  np.testing.assert_array_equal(one[0], three[1])


def test_encoding_imports_no_tensorflow():
  code = "import sys, cogvideox_jax.precompute.encode_clips; sys.exit('tensorflow' in sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
  assert jax.default_backend() == "cpu"


def test_a_run_that_encoded_nothing_is_a_mistake_that_lists_the_reasons(tmp_path, model, config):
  clips = write_clips(tmp_path / "clips", 3)
  for name in ("000.mp4", "001.mp4", "002.mp4"):
    (clips / name).write_bytes(b"")
  with (clips / "manifest.jsonl").open("a") as manifest:
    manifest.write('{"file": "000.mp4"}\n')
  for _ in range(2):
    with pytest.raises(UserError) as caught:
      encode(typed(config), clips, tmp_path / "out", model)
    lines = str(caught.value).splitlines()
    assert lines[0] == "Not one clip was encoded: all 4 files or lines were refused."
    assert lines[1].startswith("  3x 0 bytes") and lines[2] == "  1x no caption"
    assert "quarantine.jsonl" in lines[3] and len(lines) <= 8
  assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
  "value", [np.nan, *(pytest.param(x, marks=pytest.mark.slow) for x in (6e4, -6e4)), 200.0]
)
def test_latents_that_no_sound_vae_makes_are_refused(tmp_path, model, config, monkeypatch, value):
  clips = write_clips(tmp_path / "clips", 4)
  moments = FrozenNetworks.moments

  def spoiled(self, frames):
    mean, logvar = moments(self, frames)
    moves = mean.shape[1] > 1  # Clips 1 and 2.
    return (mean.at[0, 0, 0, 0, 0].set(value) if moves else mean), logvar

  monkeypatch.setattr(FrozenNetworks, "moments", spoiled)
  assert encode(typed(config), clips, tmp_path / "out", model) == (3, 1)
  refusal = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
  assert refusal["file"] == "001.mp4"
  words = "not finite" if np.isnan(value) else f"latents reach {abs(value):.0f}, which is"
  assert words in refusal["reason"]
