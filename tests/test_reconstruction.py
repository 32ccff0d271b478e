"""The commands `reconstruct` and `evaluate vae`, and what they stand on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import VAE_CONFIG, draw
from flax import nnx
from in_process import run_here

from cogvideox_jax.conversion import diffusers
from cogvideox_jax.data import shape_clips
from cogvideox_jax.data.mp4 import write_mp4
from cogvideox_jax.data.video import probe, read
from cogvideox_jax.errors import UserError
from cogvideox_jax.evaluation import i3d_weights, lpips_weights, quality, vae_table
from cogvideox_jax.evaluation.clip_scores import ClipTally, Judges
from cogvideox_jax.evaluation.reconstruction import (
  Training,
  VAEModel,
  check_size,
  most_frames,
  open_vae,
  reconstruct,
  reconstruct_stream,
)
from cogvideox_jax.evaluation.vae_table import Setting
from cogvideox_jax.models import vae as vae_module
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.vae import VAE

KEYS = {
  *("model", "compression", "channels", "parameters", "psnr", "psnr_clip", "ssim", "lpips"),
  *("fvd", "fvd_clips", "flicker", "flicker_source", "clips", "frames", "size", "train_steps"),
  *("train_seconds", "seed"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Three moving shapes of 32x48, and a drawn VAE."""
  folder = tmp_path_factory.mktemp("evaluated")
  shape_clips.render_dataset(folder / "clips", 3, 0, sizes=((32, 48),), durations=(9,), fps=8.0)
  diffusers.save_vae(folder / "vae", *draw(VAE, VAE_CONFIG))
  return folder


@pytest.fixture
def evaluate(monkeypatch, capfd, folder):
  """Runs `evaluate vae` on the clips; returns the result, and the rows of --json."""

  def run(*args):
    clips = f"--clips={folder / 'clips'}"
    done = run_here(monkeypatch, capfd, "evaluate", "vae", clips, "--workers=1", "--json", *args)
    lines = [line for line in done.output.splitlines() if line.startswith("{")]
    assert done.output.splitlines()[-len(lines) :] == lines
    return done, [json.loads(line) for line in lines]

  return run


def drawn_vae(config=VAE_CONFIG) -> VAEModel:
  config, params = draw(VAE, config)
  return VAEModel("drawn", config, jax.device_put(params), Training())


def test_a_clip_is_decoded_chunk_by_chunk_from_the_means_of_its_latents():
  vae = drawn_vae()
  clips = np.random.RandomState(0).randint(0, 256, (2, 17, 16, 16, 3), np.uint8)
  module = nnx.merge(graph_of(VAE, vae.config), vae.params)
  mean, _ = vae_module.encode(module, jnp.float32(clips) / 127.5 - 1)
  wanted = quality.to_bytes(np.asarray(vae_module.decode(module, mean)) / 2 + 0.5)
  np.testing.assert_allclose(reconstruct(vae, clips).astype(int), wanted, atol=1)


def test_a_stream_gives_the_bits_of_the_whole_clip_and_holds_few_frames():
  vae = drawn_vae()
  clips = np.random.RandomState(0).randint(0, 256, (1, 41, 16, 16, 3), np.uint8)
  read, most_held, restored = 0, 0, []

  def frames():
    nonlocal read
    for k in range(41):
      read += 1
      yield clips[:, k : k + 1]

  for chunk in reconstruct_stream(vae, frames(), 41):
    most_held = max(most_held, read - sum(part.shape[1] for part in restored))
    restored.append(chunk)
  np.testing.assert_array_equal(np.concatenate(restored, axis=1), reconstruct(vae, clips))
  assert most_held <= 17  # The first chunk has 9 frames, and all others 8.


def test_a_clip_is_scored_the_same_in_parts():
  judges = Judges("alexnet", (16, 16), fvd_frames=None)
  draws = np.random.RandomState(0)
  source, restored = draws.randint(0, 256, (2, 9, 16, 16, 3), np.uint8)
  tally = ClipTally(judges)
  for part in (slice(0, 1), slice(1, 6), slice(6, 9)):
    tally.add(source[part], restored[part])
  assert tally.scores() == judges.score(source, restored)
  assert tally.scores().flicker == pytest.approx(quality.flicker(restored))
  assert tally.scores().psnr == pytest.approx(quality.psnr(source, restored).of_frames)
  assert judges.score(source[:1], restored[:1]).flicker is None


@pytest.mark.parametrize(
  ("time", "frames", "good"), [(4, 5, "1 or 9"), (4, 13, "9 or 17"), (8, 25, "17 or 33")]
)
def test_numbers_of_frames_that_do_not_come_back_are_refused(time, frames, good):
  vae = drawn_vae()
  vae = vae._replace(config=dataclasses.replace(vae.config, temporal_compression=time))
  with pytest.raises(UserError, match=f"{frames} frames gives .* frames, not {frames}") as raised:
    check_size(vae, frames, 16, 16)
  assert f"Use {good} frames" in str(raised.value)
  most = most_frames(vae, frames)
  assert most == int(good.split()[0])
  check_size(vae, most, 16, 16)


def test_a_model_is_a_folder_a_vae_or_a_workdir(folder, tmp_path):
  (tmp_path / "vae").symlink_to(folder / "vae")
  (tmp_path / "config.json").write_text(json.dumps({"train": {"steps": 30}, "seed": 7}))
  lines = [{"step": 10, "step_seconds": 2.0}, {"step": 20, "step_seconds": 9.0}, {"step": 10},
           {"step": 20, "step_seconds": 1.0}, {"step": 30, "step_seconds": 0.5}]  # fmt: skip
  (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 40, "st')
  found = open_vae(str(tmp_path))
  assert found.training == Training(steps=30, seconds=35.0, seed=7)
  assert found.config == open_vae(str(folder / "vae")).config
  assert open_vae(str(folder)).training == open_vae("tiny").training == Training()


def test_a_folder_without_a_vae_is_refused(tmp_path):
  with pytest.raises(UserError, match="holds no VAE"):
    open_vae(str(tmp_path))
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(UserError, match="train_vae writes it at its end"):
    open_vae(str(tmp_path))


def test_evaluate_prints_a_row_for_each_model_and_writes_the_table(evaluate, folder, tmp_path):
  models = [f"--model={folder / 'vae'}", "--model=tiny"]
  done, rows = evaluate(*models, "--num_frames=9", "--nofvd", f"--output={tmp_path / 'table'}")
  assert not done.code and len(rows) == 2
  for row in rows:
    assert set(row) >= KEYS
    assert (row["clips"], row["frames"], row["size"]) == (3, 9, "32x32")
    assert row["compression"] == "4x4x4" and row["fvd"] is None and not row["fvd_clips"]
    assert row["flicker_excess"] == pytest.approx(row["flicker"] - row["flicker_source"])
  drawn, tiny = rows
  assert tiny["model"] == "tiny" and tiny["psnr"] > drawn["psnr"] + 5
  assert tiny["lpips"] < drawn["lpips"] and tiny["ssim"] > drawn["ssim"]
  assert tiny["flicker_source"] == drawn["flicker_source"] > 0
  table = (tmp_path / "table" / "table.md").read_text()
  assert table in done.output and f"{tiny['psnr']:.2f}" in table
  assert (tmp_path / "table" / "table.png").read_bytes().startswith(b"\x89PNG")


def test_missing_packages_make_null_and_say_how_to_install_them(monkeypatch, evaluate):
  for table, key in ((lpips_weights.WEIGHTS, "alexnet"), (vars(i3d_weights), "WEIGHTS")):
    monkeypatch.setitem(table, key, table[key]._replace(package="not-here"))
  done, (row,) = evaluate("--model=tiny", "--num_frames=9")
  assert row["lpips"] is None and row["fvd"] is None and row["psnr"] > 0
  assert [note.split(":")[0] for note in row["notes"]] == ["no LPIPS", "no FVD"]
  assert "pip install not-here==0.1.0" in row["notes"][0] and row["notes"][0][3:] in done.output


def test_fvd_compares_the_logits_of_all_clips_and_says_how(monkeypatch):
  """With means of colours in the place of I3D's logits, which take seconds."""
  no_lpips = lpips_weights.WEIGHTS["alexnet"]._replace(package="not-here")
  monkeypatch.setitem(lpips_weights.WEIGHTS, "alexnet", no_lpips)
  judges = Judges("alexnet", (16, 16), fvd_frames=None)
  judges.features = FakeFeatures()
  draws = np.random.RandomState(0)
  batches = [draws.randint(0, 256, (1, 9, 16, 16, 3), np.uint8) for _ in range(5)]
  setting = Setting(9, 16, 16, 8.0, "first frames", False)
  (row,) = vae_table.compare([drawn_vae()], batches, judges, setting)
  assert row["fvd"] > 0 and row["fvd_clips"] == row["clips"] == 5
  assert "5 clips, 9 frames, 8 fps, first frames, unbiased" in row["fvd_flavour"]
  assert "fewer than 256" in row["notes"][1]
  (row,) = vae_table.compare([drawn_vae()], batches[:1], judges, setting)
  assert row["fvd"] is None and "at least 2 clips, not 1" in row["notes"][1]


def test_lpips_of_small_frames_is_null_with_the_reason():
  judges = Judges("alexnet", (16, 64), fvd_frames=None)
  (note,) = judges.notes
  assert "at least 31 pixels a side, not 16x64" in note
  clip = np.zeros((2, 16, 64, 3), np.uint8)
  assert judges.score(clip, clip).lpips is None and judges.score(clip, clip).psnr == 120


class FakeFeatures:
  """Has the interface of `fvd.Features`."""

  def __call__(self, frames):
    return frames.mean(axis=(1, 2, 3))

  def flavour(self, clips, frames, fps, windows, biased):
    return f"{clips} clips, {frames} frames, {fps:g} fps, {windows}, {'' if biased else 'un'}biased"


def test_fvd_of_short_clips_is_null_with_the_reason():
  judges = Judges("alexnet", (32, 32), fvd_frames=5)
  assert judges.features is None and "at least 9 frames, not 5" in judges.notes[0]


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (["--num_frames=5"], "Use 1 or 9 frames"),
    (["--height=30", "--width=32"], "The nearest size is 32x32"),
    (["--height=32"], "Give --height and --width"),
    (["--model=none"], "There is no model at"),
  ],
)
def test_mistakes_are_said_before_clips_are_decoded(evaluate, flags, said):
  done, rows = evaluate("--model=tiny", *flags)
  assert done.code == 2 and said in done.errors and not rows


def test_only_vaes_are_evaluated(monkeypatch, capfd):
  done = run_here(monkeypatch, capfd, "evaluate", "vea", "--model=tiny", "--clips=.")
  assert done.code == 2 and "Give: vae" in done.errors


def test_reconstruct_writes_and_scores_a_video(monkeypatch, capfd, tmp_path):
  y, x = np.mgrid[:34, :50]
  frames = np.stack([np.stack([x * 4 + t, y * 5, x + y], -1) for t in range(11)]).astype(np.uint8)
  write_mp4(tmp_path / "clip.mp4", frames, 10.0)
  flags = [f"--input={tmp_path / 'clip.mp4'}", f"--output={tmp_path / 'new' / 'round.mp4'}"]
  done = run_here(monkeypatch, capfd, "reconstruct", "--model=tiny", *flags, "--json")
  found = json.loads(done.output.splitlines()[-1])
  # The VAE gives 9 of 11 frames back, and takes multiples of 8 pixels.
  assert (found["frames"], found["size"], found["fps"], found["model"]) == (9, "32x48", 10, "tiny")
  info = probe(tmp_path / "new" / "round.mp4")
  assert (info.num_frames, info.height, info.width, info.fps) == (9, 32, 48, 10)
  size = {"fps": 10.0, "num_frames": 9, "height": 32, "width": 48}
  source = read(tmp_path / "clip.mp4", **size)
  restored = reconstruct(open_vae("tiny"), source[None])[0]
  assert found["psnr"] == pytest.approx(quality.psnr(source, restored).of_frames)
  assert found["flicker_source"] == pytest.approx(quality.flicker(source))
  assert 0 < found["lpips"] < 1 and 0 < found["ssim"] < 1
  written = read(tmp_path / "new" / "round.mp4", **size)
  assert quality.psnr(restored, written).of_clip > 30


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (["--output=round.avi"], "end the name in .mp4"),
    (["--output=round.mp4"], "none.mp4: the file is absent"),
  ],
)
def test_reconstruct_explains_mistakes(monkeypatch, capfd, tmp_path, flags, said):
  args = ["--model=tiny", f"--input={tmp_path / 'none.mp4'}", *flags]
  done = run_here(monkeypatch, capfd, "reconstruct", *args, folder=tmp_path)
  assert done.code == 2 and said in done.errors and not list(tmp_path.iterdir())
