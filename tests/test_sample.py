"""The command line, from prompt to mp4."""

from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver
from commands import run_command
from drawn import DIT_CONFIG, NOISE, VAE_CONFIG, make_pipeline
from etils import epath

from cogvideox_jax import __version__, sample
from cogvideox_jax.conversion.folder import Settings
from cogvideox_jax.data.files import write_whole
from cogvideox_jax.data.mp4 import read_metadata
from cogvideox_jax.data.video import probe
from cogvideox_jax.diffusion.noise import noise_schedule
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference.offload import is_on_host
from cogvideox_jax.inference.pipeline import Pipeline
from cogvideox_jax.inference.request import SampledModel
from cogvideox_jax.training import workdir


@pytest.fixture
def run(monkeypatch, tmp_path):
  """Runs the verb on drawn weights, with flags by name; returns where the video should be."""
  settings = Settings(text_drop="zeros", guidance_scale=2.0, num_inference_steps=2, fps=12.0)

  def load(model, progress, offload):
    return make_pipeline(settings=settings, offload=offload)

  monkeypatch.setattr(Pipeline, "from_pretrained", load)
  known = SampledModel(DIT_CONFIG, VAE_CONFIG, noise_schedule(NOISE), settings)
  monkeypatch.setattr(workdir, "describe", lambda _: known)

  flags.FLAGS.mark_as_parsed()

  def call(**values):
    output = str(tmp_path / "out" / "video.mp4")
    values = {"model": "drawn", "prompt": "a red circle", "output": output, **values}
    with flagsaver.flagsaver(**values):
      sample.main()
    return values["output"]

  return call


def test_flags_not_given_are_as_the_model_has_them(run):
  path = run()
  info = probe(path)
  assert (info.num_frames, info.height, info.width, info.fps) == (9, 16, 24, 12.0)


@pytest.mark.parametrize("num_frames", [5, pytest.param(13, marks=pytest.mark.slow)])
def test_as_many_frames_are_written_as_were_asked_for(run, num_frames, capsys):
  assert probe(run(num_frames=num_frames, steps=1)).num_frames == num_frames
  said = f"The VAE decodes {num_frames + 3} frames; the first {num_frames}, as asked for, are writt"
  assert capsys.readouterr().out.count(said) == 1


def test_the_file_tells_all_it_was_made_with_and_what_was_cut_is_said(run):
  prompt = 'a "red" circle, Привет 🎈'
  with pytest.warns(UserWarning, match="longer than the model's 6.*ignored: 'circle"):
    path = run(
      prompt=prompt, negative_prompt="blur", seed=7, steps=3, guidance_scale=3.5, solver="dpm",
      num_frames=1, height=24, width=32, fps=8.0, dynamic_cfg=True,
    )  # fmt: skip
  assert read_metadata(path) == {
    "model": "drawn",
    "version": __version__,
    "prompt": prompt,
    "negative_prompt": "blur",
    "seed": 7,
    "num_inference_steps": 3,
    "guidance_scale": 3.5,
    "use_dynamic_cfg": True,
    "solver": "dpm",
    "num_frames": 1,
    "height": 24,
    "width": 32,
    "fps": 8.0,
  }


def test_the_same_command_writes_the_same_bytes(run, tmp_path):
  first, again, other = (
    Path(run(seed=seed, output=str(tmp_path / f"{i}.mp4"))).read_bytes()
    for i, seed in enumerate((1, 1, 2))
  )
  assert first == again != other


def test_components_that_wait_in_host_memory_make_the_same_file(run, tmp_path, monkeypatch):
  on_host, call = [], Pipeline.__call__

  def spy(pipe, *args, **kwargs):
    on_host.append(is_on_host(pipe._params))
    return call(pipe, *args, **kwargs)

  monkeypatch.setattr(Pipeline, "__call__", spy)
  plain, offloaded = (
    Path(run(offload=offload, output=str(tmp_path / f"{offload}.mp4"))).read_bytes()
    for offload in (False, True)
  )
  assert plain == offloaded
  assert on_host == [False, True]


def test_it_says_where_the_video_is_and_what_compiling_took(run, capsys):
  path = run()
  printed = capsys.readouterr().out
  assert f"Wrote {path}: 9 frames of 24x16 at 12 fps, seed 0." in printed
  assert "compile" in printed


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"output": "video.avi"}, "mp4"),
    ({"output": "/proc/none/video.mp4"}, "nothing can be written there"),
    ({"num_frames": 8}, "num_frames=8"),
    ({"seed": -1}, "seed=-1"),
  ],
)
def test_mistakes_are_explained(run, values, message):
  with pytest.raises(UserError, match=message):
    run(**values)


def test_a_missing_model_ends_with_2_and_how_to_get_one(tmp_path):
  (tmp_path / "out").mkdir()
  output = f"--output={tmp_path / 'out' / 'video.mp4'}"
  ended = run_command(tmp_path, "sample", "--model=nowhere", "--prompt=a", output)
  assert ended.code == 2
  assert "nowhere" in ended.errors and "tiny" in ended.errors
  assert "Traceback" not in ended.errors
  assert not list((tmp_path / "out").iterdir())


def test_the_check_of_the_output_touches_no_file(tmp_path):
  """Not even through links of names that a draft might have."""
  (tmp_path / "theirs").write_text("theirs")
  for name in (".video.mp4.draft", "video.mp4.unfinished"):
    (tmp_path / name).symlink_to(tmp_path / "theirs")
  before = sorted(path.name for path in tmp_path.iterdir())
  sample.check_output(epath.Path(tmp_path) / "video.mp4")
  write_whole(tmp_path / "video.mp4", b"ours")
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "video.mp4"])
  assert (tmp_path / "theirs").read_text() == "theirs"
